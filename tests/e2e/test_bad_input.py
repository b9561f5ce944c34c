"""Bad input gets a clear error that says what to do, all at once, and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from service.cluster.driver import Capacity, Driver
from tests.checkpoints import fine_tune, llama_tensors, read_checkpoint, write_checkpoint
from tests.e2e.bench import Bench, LocalDriver
from tests.servers.service import RunningService, running_service
from workers.errors import FleetError

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

PROBLEM = "application/problem+json"


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the base at ``base`` and of a fine-tune at ``one``."""
    tensors = llama_tensors(0, layers=1, hidden=32, heads=2, vocab=64, dtype=torch.float32)
    write_checkpoint(tmp_path / "base", tensors)
    write_checkpoint(tmp_path / "one", fine_tune(tensors, 1, 0.1))
    return tensors


def ties(root: Path, *models: str, **parameters: Any) -> dict[str, Any]:
    """A TIES recipe over models below ``root``."""
    return {
        "merge_method": "ties",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in models],
        "parameters": parameters,
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_method": "tiesd"}, ["merge_method", "ties"]),
        ({"base_model": None}, ["base_model"]),
        ({"models": []}, ["models"]),
        ({"parameters": {"density": 1.5}}, ["density", "1"]),
        ({"parameters": {"densty": 0.5}}, ["densty", "density"]),
        ({"parameters": {"density": [0.1, 1.9]}}, ["density", "1"]),
        ({"slices": []}, ["slices"]),
        ({"dtyp": "float32"}, ["dtyp", "dtype"]),
        ({"models": [{"model": "../elsewhere"}]}, ["../elsewhere", "relative"]),
        ({"models": [{"model": "org/unknown"}]}, ["org/unknown", "MERGEMILL_MODEL_ROOTS"]),
        ({"profile": "paper", "parameters": {"equal_magnitudes": "exact_k"}}, ["trim_scope", "tensor"]),
    ],
)
def test_what_the_recipe_alone_shows_is_refused_at_once(
    service: RunningService, tmp_path: Path, change: dict[str, Any], expected: list[str]
) -> None:
    body = {"recipe": ties(tmp_path, "one") | change, "output": str(tmp_path / "out")}
    answer = service.http.post("/v1/merges", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert problem["status"] == 422
    for word in expected:
        assert word in " ".join(problem["errors"])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("{", "JSON"),
        ('{"recipe": {}, "output": "relative/path"}', "merge_method"),
        ('{"recipe": {"merge_method": "linear"}, "output": "/o", "options": {"part_bytes": 1}}', "models"),
        ('{"recipe": {"merge_method": "linear", "models": [{"model": "/m"}]}, "output": "o"}', "output"),
        (
            '{"recipe": {"merge_method": "linear", "models": [{"model": "/m"}]}, "output": "/o", '
            '"options": {"part_bytes": 1}}',
            "part_bytes",
        ),
    ],
)
def test_requests_that_cannot_be_read(service: RunningService, body: str, word: str) -> None:
    answer = service.http.post("/v1/merges", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == (400 if word == "JSON" else 422)
    assert answer.headers["content-type"] == PROBLEM
    assert word in answer.text


def test_everything_about_the_inputs_is_said_at_once(
    service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    names = list(base)
    lacking = fine_tune(base, 1, 0.1)
    del lacking[names[0]]
    write_checkpoint(tmp_path / "lacking", lacking)
    reshaped = fine_tune(base, 2, 0.1)
    reshaped[names[1]] = torch.zeros(3, 3)
    reshaped["surplus.weight"] = torch.zeros(2)
    write_checkpoint(tmp_path / "reshaped", reshaped)
    said = service.failure(ties(tmp_path, "lacking", "reshaped"), str(tmp_path / "base" / "inside"))
    for expected in (names[0], names[1], "surplus.weight", "missing_tensors", "extra_tensors", "overlaps"):
        assert expected in said
    assert not (tmp_path / "base" / "inside").exists()
    plan = service.http.post(
        "/v1/plans",
        json={"recipe": ties(tmp_path, "lacking", "reshaped"), "output": str(tmp_path / "elsewhere")},
    )
    assert plan.status_code == 422
    assert names[0] in plan.text
    assert "surplus.weight" in plan.text


def test_missing_and_corrupt_models(
    service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    broken = write_checkpoint(tmp_path / "broken", base) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-5])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    said = service.failure(ties(tmp_path, "absent", "broken", "pickled"), str(tmp_path / "out"))
    for expected in ("absent", "broken", "truncated", "pickled", "safetensors"):
        assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("route", ["/v1/merges", "/v1/plans"])
def test_a_refused_recipe_is_answered_with_all_that_is_wrong(
    service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path, route: str
) -> None:
    name = list(base)[1]
    write_checkpoint(tmp_path / "reshaped", fine_tune(base, 2, 0.1) | {name: torch.zeros(3, 3)})
    out = write_checkpoint(tmp_path / "out", {"other": torch.zeros(2)})
    before = sorted((path, path.read_bytes()) for path in out.iterdir())
    recipe = ties(tmp_path, "one", "absent", "reshaped", density=1.5, wieght=2) | {"dtyp": "float32"}
    recipe["models"].append({"model": "org/unknown"})
    body = {"recipe": recipe, "output": str(out), "options": {"worker_memory_bytes": 64 << 20}}
    answer = service.http.post(route, json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert problem["type"] == "urn:mergemill:error:recipe"
    wanted = [
        "dtyp: is not a key",
        "parameters.density: input should be less than or equal to 1",
        "did you mean 'weight'",
        "'org/unknown' is a hub name",
        "absent: no model here",
        f"shape differs from {tmp_path}/base: {name} [3, 3]",
        "raise it to at least",
        "already holds a checkpoint (model.safetensors): to replace it, give --overwrite",
    ]
    assert len(problem["errors"]) == len(wanted), problem["errors"]
    for says in wanted:
        assert sum(says in each for each in problem["errors"]) == 1, (says, problem["errors"])
    assert all(each in problem["detail"] for each in problem["errors"])
    assert sorted((path, path.read_bytes()) for path in out.iterdir()) == before


def test_an_unknown_method_does_not_hide_what_is_wrong_with_the_models(
    service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    recipe = ties(tmp_path, "one", "absent") | {"merge_method": "tiesd"}
    text = json.dumps(recipe)  # which is YAML
    for route in ("/v1/merges", "/v1/plans"):
        answer = service.http.post(
            route,
            content=text,
            params={"output": str(tmp_path / "base" / "inside")},
            headers={"content-type": "application/yaml"},
        )
        first, second, third = answer.json()["errors"]
        assert "did you mean 'ties'" in first
        assert "absent: no model here" in second
        assert "overlaps the input" in third
    assert not (tmp_path / "base" / "inside").exists()


def test_a_refused_recipe_of_slices_is_answered_with_all_that_is_wrong(
    service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    listed = [("one", 0, 1), ("base", 3, 9), ("absent", 0, 1)]
    slices = [
        {"sources": [{"model": str(tmp_path / name), "layer_range": [first, last]}]}
        for name, first, last in listed
    ]
    body = {
        "recipe": {"merge_method": "passthrough", "slices": slices, "sed": 1},
        "output": str(tmp_path / "out"),
    }
    for route in ("/v1/merges", "/v1/plans"):
        answer = service.http.post(route, json=body)
        assert answer.status_code == 422
        first, *others = answer.json()["errors"]
        assert "did you mean `seed`" in first
        assert len(others) == 2
        assert any("slices[1].sources[0].layer_range: [3, 9] goes beyond" in each for each in others)
        assert any("absent: no model here" in each for each in others)


def test_differing_buffers(service: RunningService, base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, value in (("base", 1), ("one", 1), ("two", 2)):
        write_checkpoint(tmp_path / name, base | {"position_ids": torch.full((4,), value)})
    said = service.failure(ties(tmp_path, "one", "two"), str(tmp_path / "out"))
    assert "position_ids" in said
    assert str(tmp_path / "two") in said
    assert "buffers" in said
    wanted = ties(tmp_path, "one", "two") | {"buffers": str(tmp_path / "two")}
    service.merge(wanted, str(tmp_path / "out"))
    assert read_checkpoint(tmp_path / "out")["position_ids"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 3)])
def test_nonfinite_input(
    service: RunningService,
    base: dict[str, torch.Tensor],
    tmp_path: Path,
    value: float,
    count: int,
) -> None:
    name = next(iter(base))
    bad = fine_tune(base, 1, 0.1)
    bad[name].view(-1)[:count] = value
    write_checkpoint(tmp_path / "bad", bad)
    said = service.failure(ties(tmp_path, "one", "bad", density=0.5), str(tmp_path / "out"))
    assert name in said
    assert str(tmp_path / "bad") in said
    assert f" {count} NaN or Inf" in said
    assert not (tmp_path / "out" / ".mergemill").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))

    service.merge(ties(tmp_path, "one", "bad", density=0.5), str(tmp_path / "out"), allow_nonfinite=True)
    merged = read_checkpoint(tmp_path / "out")
    spoilt = {key: int((~torch.isfinite(tensor)).sum()) for key, tensor in merged.items()}
    assert {key: n for key, n in spoilt.items() if n} == {name: count}


def test_too_little_memory(valkey_url: str, driver: Driver, base: Any, tmp_path: Path) -> None:
    with running_service(valkey_url, driver, worker_memory_bytes=64 << 20) as small:
        said = small.failure(ties(tmp_path, "one"), str(tmp_path / "out"))
        assert "worker_memory_bytes" in said
        assert "MiB" in said
        body = {"recipe": ties(tmp_path, "one"), "output": "/o", "options": {"worker_memory_bytes": 1 << 40}}
        assert "at most" in small.http.post("/v1/merges", json=body).text


def test_a_task_larger_than_every_node(valkey_url: str, driver: Driver, base: Any, tmp_path: Path) -> None:
    with running_service(
        valkey_url, driver, worker_memory_bytes=1 << 50, worker_baseline_bytes=1 << 45
    ) as greedy:
        said = greedy.failure(ties(tmp_path, "one"), str(tmp_path / "out"))
        assert "largest node" in said
        both = greedy.failure(ties(tmp_path, "one", "absent"), str(tmp_path / "out"), worker_memory_bytes=1)
        for expected in ("largest node", "raise it to at least", "absent: no model here"):
            assert sum(expected in each for each in both.split("\n")) == 1, both


class NoCluster(LocalDriver):
    """A cluster that does not come up, and how long it was waited for."""

    waited: ClassVar[list[float | None]] = []

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        self.waited.append(timeout_s)
        raise FleetError("the fleet is not up yet")


def test_a_job_that_fails_anyhow_does_not_wait_for_the_cluster(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.driver = NoCluster()
    record = bench.run(bench.submit(ties(tmp_path, "one", "absent"), tmp_path / "out"))
    assert record.error is not None
    assert [problem.rpartition("/")[2][:6] for problem in record.error["problems"]] == ["absent"]
    assert len(NoCluster.waited) == 1
    monkeypatch.setattr("service.running.preparation.CLUSTER_WAIT_S", 0.2)
    record = bench.run(bench.submit(ties(tmp_path, "one"), tmp_path / "out"))
    assert record.error is not None
    assert record.error["type"] == "FleetError"
    assert len(NoCluster.waited) > 2


@pytest.fixture
def slow_service(valkey_url: str, driver: Driver) -> Iterator[RunningService]:
    """A service without a scheduler that would take jobs from under a test's hands."""
    with running_service(valkey_url, driver, poll_seconds=3600.0) as service:
        yield service


def test_cancel_and_lookup_errors(slow_service: RunningService, base: Any, tmp_path: Path) -> None:
    http = slow_service.http
    assert http.get("/v1/merges/merge-unknown").status_code == 404
    assert http.get("/v1/merges", params={"cursor": "garbage"}).status_code == 400
    assert http.get("/v1/nothing").headers["content-type"] == PROBLEM
    job = slow_service.submit(ties(tmp_path, "one"), str(tmp_path / "out"))
    assert http.get(job["links"]["files"]).status_code == 409
    assert http.post(job["links"]["cancel"]).json()["state"] == "cancelled"
    assert http.post(job["links"]["cancel"]).json()["state"] == "cancelled"


def test_a_finished_job_cannot_be_cancelled(service: RunningService, base: Any, tmp_path: Path) -> None:
    done = service.merge(ties(tmp_path, "one"), str(tmp_path / "out"))
    answer = service.http.post(done["links"]["cancel"])
    assert answer.status_code == 409
    assert "succeeded" in answer.json()["detail"]


def test_pages_of_jobs(slow_service: RunningService, base: Any, tmp_path: Path) -> None:
    ids = [slow_service.submit(ties(tmp_path, "one"), str(tmp_path / f"out{i}"))["id"] for i in range(5)]
    found: list[str] = []
    cursor = None
    while True:
        params = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = slow_service.http.get("/v1/merges", params=params).json()
        found += [job["id"] for job in page["jobs"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert found == ids[::-1]
    assert slow_service.http.get("/v1/merges", params={"state": "failed"}).json()["jobs"] == []
