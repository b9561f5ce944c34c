"""What a scheduler does for a job whose key allows only so much: it looks again, and fails it with the reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from service.jobs.record import JobState, new_job
from service.keys import Access
from service.recipe import parse_recipe
from tests.checkpoints import fine_tune, write_checkpoint
from tests.e2e.bench import Bench
from workers.store.uris import normalise

pytestmark = pytest.mark.valkey


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A tenant's directory with two models; another's beside it."""
    for seed, name in enumerate(("home/a", "home/b", "other/a")):
        files = {"tokenizer.json": "{}"}
        write_checkpoint(tmp_path / name, fine_tune({"w": torch.arange(8.0)}, seed, 0.1), extra_files=files)
    return tmp_path / "home"


def queued(bench: Bench, home: Path, input_bytes: int = 0) -> str:
    """A job that its key was granted; its id."""
    recipe = {"merge_method": "linear", "models": [{"model": str(home / name)} for name in "ab"]}
    access = Access(inputs=(home.as_uri(),), outputs=(f"{home.as_uri()}/out",), input_bytes=input_bytes)
    options = bench.settings.default_options.model_dump(mode="json")
    output = normalise(str(home / "out/1"))
    record = new_job(
        parse_recipe(recipe).to_json(), output, options, time.time(), key="a" * 12, access=access
    )
    bench.jobs.create(record)
    return record.id


def failure(bench: Bench, job: str) -> str:
    """Why the job fails, with nothing left of it."""
    record = bench.run(job)
    assert record.state == JobState.FAILED
    assert record.error is not None
    return f"{record.error['type']}: {record.error['detail']}"


def test_what_was_granted_is_done(bench: Bench, home: Path) -> None:
    record = bench.run(queued(bench, home, input_bytes=64))
    assert record.state == JobState.SUCCEEDED, record.error
    assert (home / "out/1/tokenizer.json").read_text() == "{}"


def test_a_job_of_too_many_bytes_fails_before_it_writes(bench: Bench, home: Path) -> None:
    said = failure(bench, queued(bench, home, input_bytes=63))
    assert "64 bytes" in said
    assert "allows 63" in said
    assert not (home / "out").exists()


@pytest.mark.parametrize("name", ["a", "a/model.safetensors", "a/tokenizer.json", "a/config.json"])
def test_an_input_that_became_a_link_after_the_job_was_accepted(bench: Bench, home: Path, name: str) -> None:
    job = queued(bench, home)
    place = home / name
    if place.exists():
        place.rename(home / "away")
    place.symlink_to(home.parent / "other" / name.replace("config.json", "tokenizer.json"))
    said = failure(bench, job)
    assert said.startswith("ForbiddenError")
    assert place.as_uri() in said
    assert not (home / "out").exists()


def test_an_output_that_became_a_link_after_the_job_was_accepted(bench: Bench, home: Path) -> None:
    job = queued(bench, home)
    (home / "out").mkdir()
    (home / "out/1").symlink_to(home.parent / "other")
    before = sorted(home.parent.joinpath("other").rglob("*"))
    assert failure(bench, job).startswith("ForbiddenError")
    assert sorted(home.parent.joinpath("other").rglob("*")) == before
