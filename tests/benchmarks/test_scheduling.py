"""The scheduling benchmark: who is who, what was used when, and parts that nobody makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hollow import PACE_FILE, make_hollow_inputs, result_of, tasks
from benchmarks.inputs import SIZES
from benchmarks.scheduling import (
    SHAPES,
    Measured,
    history_of,
    part_and_second,
    report,
    seconds_by_phase,
    shape_of,
    used_by_phase,
)
from benchmarks.usage import ROLES, Sample, role_of
from service.planning.plan import Plan, PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_recipe
from service.running.sidecars import tensor_digests
from workers.store.base import UploadedPart
from workers.store.local import LocalStore
from workers.store.uris import from_path, join
from workers.task import PART, PART_RESULT

pytestmark = pytest.mark.fast

HISTORY = [("queued", 10.0), ("running", 11.0), ("queued", 15.0), ("running", 16.0), ("succeeded", 20.0)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    inputs = make_hollow_inputs(replace(SIZES["1b"], layers=2, tunes=2), tmp_path)
    models = [{"model": str(inputs.directory(model))} for model in inputs.size.models]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    return plan_recipe(recipe, PlanOptions(shard_bytes=300_000_000), LocalStore(), {}).plan


def test_hollow_parts_are_held_as_the_store_holds_parts(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, shard = LocalStore(), plan.shards[1]
    monkeypatch.setattr("os.posix_fallocate", lambda *_: None)  # no disk is that big
    upload = store.open_upload(join(from_path(str(tmp_path)), shard.name), shard.size, {})
    (tmp_path / "pace").write_text("0")
    monkeypatch.setenv(PACE_FILE, str(tmp_path / "pace"))
    parts = [part for part in plan.parts if part.shard == shard.name]
    payloads = [
        {"part": PART.dump_json(part).decode(), "upload": {"uri": upload.uri, "id": upload.id}}
        for part in parts
    ]
    results = [PART_RESULT.validate_json(value) for _, value in tasks(payloads)]
    assert [each.part for each in results] == [
        i for i, p in zip(plan.part_ids, plan.parts, strict=True) if p in parts
    ]
    held = store.list_parts(upload)
    assert held == [UploadedPart(each.number, each.size, each.etag) for each in results]
    store.complete(upload, held)
    assert store.head(upload.uri).size == shard.size
    assert (tmp_path / shard.name).stat().st_blocks * 512 < 1 << 20


def test_hollow_results_have_every_digest(plan: Plan) -> None:
    results = [result_of(part) for part in plan.parts]
    assert tensor_digests(plan, results).keys() == plan.weight_map.keys()
    assert sum(each.bytes_read for each in results) == plan.price.bytes_read


@pytest.mark.parametrize("parts", [300, 1000, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_about_as_many_parts_as_are_wanted(shape: str, parts: int) -> None:
    size = shape_of(SHAPES[shape], parts)
    assert 2 * size.parameters / PlanOptions().part_bytes == pytest.approx(parts, rel=0.2)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("/venv/bin/python -m benchmarks.hollow /tmp/ready", "scheduler"),
        ("/venv/bin/python -m service.cluster.fleet 5", "driver"),
        (
            "/venv/bin/python -m service.cluster.warden 12 --scratch /tmp/x -- python -m service.cluster.fleet 5",
            "driver",
        ),
        ("/venv/ray/core/src/ray/raylet/raylet --node_id=1", "ray"),
        ("ray::model.layers.0.mlp and 15 more", None),
        ("ray::IDLE", None),
        ("/venv/bin/python /venv/ray/_private/workers/default_worker.py --node-ip-address=1", None),
    ],
)
def test_processes_are_known_by_their_commands(command: str, role: str | None) -> None:
    assert role_of(command) == role


def test_a_history_begins_each_state_once_in_a_row() -> None:
    states = {
        16.0: "running",
        10.0: "queued",
        11.0: "running",
        12.0: "running",
        15.0: "queued",
        20.0: "succeeded",
    }
    assert history_of(states) == HISTORY


def test_phases_add_up_what_was_used_between_their_events() -> None:
    samples = [Sample(10.0, {"driver": 1.0}), Sample(12.0, {"driver": 3.0}), Sample(20.0, {"driver": 11.0})]
    assert seconds_by_phase(HISTORY) == {"queued": 2.0, "running": 8.0}
    assert used_by_phase(HISTORY, samples) == {
        "queued": {"driver": pytest.approx(2.0)},
        "running": {"driver": pytest.approx(8.0)},
    }


def measured(parts: int, wall_s: float, used: float, pace_s: float = 0.0) -> Measured:
    return Measured(
        parts, parts * 10**8, pace_s, {"running": wall_s},
        {"running": dict.fromkeys(ROLES, used)}, {"scheduler": 1 << 28, "driver": 1 << 26},
    )  # fmt: skip


def test_a_part_and_a_second_are_told_apart() -> None:
    fast, slow = (
        measured(1000, 10.0, 1000 * 0.003 + 10.0 * 0.02),
        measured(500, 100.0, 500 * 0.003 + 100.0 * 0.02),
    )
    assert part_and_second(fast, slow, "driver") == pytest.approx((0.003, 0.02))
    assert part_and_second(fast, slow, "driver", "ray") == pytest.approx((0.006, 0.04))


def test_the_report_says_what_share_scheduling_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    # 1000 parts of 0.1 GB at 1 CPU-s/GB are 100 CPU seconds, 50 s on two cores: 40 s more, at 0.02 a second and role.
    fast, slow = measured(1000, 10.0, 3.2), measured(1000, 100.0, 5.0, 0.1)
    told = list(report([measured(100, 1.0, 0.1), fast], slow, 1.0))
    assert len(told) == 2 + 3 + 4
    assert told[3].startswith("| 1,000 | 0 | 10.0 | 0.0, 10.0, 0.0 | 3.20 |")
    assert "100 CPU seconds" in told[-3]
    assert told[-2].endswith("8.0 in all, 7.41 % of the job.")
    assert json.dumps(told)
