"""Streams of tasks: the same bytes as one by one, each task's failure its own, and one arena for all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.planning.plan import PlanOptions
from service.planning.price import price
from tests.checkpoints import Tensors, fine_tune, llama_tensors
from tests.workers.execute import MIB, dyadic, plan, run, write_models
from workers import entry
from workers.arena import Arena, Pin, padded
from workers.errors import MergemillError, NonFiniteError
from workers.kernels import kernels_of
from workers.run import PartRun, Tools, run_tasks
from workers.store import StoreSettings
from workers.store.base import Upload, UploadedPart
from workers.store.local import LocalStore
from workers.store.uris import from_path, join
from workers.task import PART, PART_RESULT, Part, PartResult

pytestmark = pytest.mark.fast

NAMES = ["a", "b"]
STORE = StoreSettings().model_dump(mode="json")


def written(
    root: Path, models: dict[str, Tensors], method: str = "ties", **options: Any
) -> tuple[Any, list[Part]]:
    write_models(root, models)
    names = NAMES if method == "ties" else NAMES[:1]
    planned = plan(root, method, names, {"density": 0.5} if method == "ties" else {}, PlanOptions(**options))
    return planned, list(planned.plan.parts)


def llamas() -> dict[str, Tensors]:
    base = llama_tensors(1)
    return {"base": base} | {name: fine_tune(base, seed) for seed, name in enumerate(NAMES)}


def payloads(store: LocalStore, planned: Any, output: Path) -> list[dict[str, Any]]:
    uploads = {
        shard.name: store.open_upload(join(from_path(str(output)), shard.name), shard.size, {})
        for shard in planned.plan.shards
    }
    return [
        {
            "part": PART.dump_json(part).decode(),
            "upload": {"uri": uploads[part.shard].uri, "id": uploads[part.shard].id},
            "facts": {},
            "store": STORE,
            "device": "cpu",
            "arena_bytes": planned.plan.price.arena_bytes,
        }
        for part in planned.plan.parts
    ]


def test_a_stream_makes_what_single_tasks_make(tmp_path: Path) -> None:
    planned, parts = written(tmp_path, llamas(), shard_bytes=60_000)
    assert len(parts) > 3
    alone = run(planned, tmp_path / "alone")
    asked = payloads(LocalStore(), planned, tmp_path / "streamed")
    answers = dict(entry.tasks(asked))
    assert list(answers) == list(range(len(parts)))
    for number, expected in enumerate(alone.results):
        found = PART_RESULT.validate_json(answers[number])
        assert (found.part, found.etag, found.digests) == (expected.part, found.etag, expected.digests)
    store = LocalStore()
    for upload in {(each["upload"]["uri"], each["upload"]["id"]) for each in asked}:
        store.complete(Upload(*upload), store.list_parts(Upload(*upload)))
    for shard in planned.plan.shards:
        assert (tmp_path / "streamed" / shard.name).read_bytes() == (
            tmp_path / "alone" / shard.name
        ).read_bytes()


def test_one_task_s_failure_leaves_the_others_alone(tmp_path: Path) -> None:
    models = llamas()
    bad = "model.layers.0.mlp.down_proj.weight"
    models["b"][bad] = models["b"][bad].clone()
    models["b"][bad].reshape(-1)[3] = float("nan")
    planned, parts = written(tmp_path, models, shard_bytes=60_000)
    answers = dict(entry.tasks(payloads(LocalStore(), planned, tmp_path / "out")))
    for number, part in enumerate(parts):
        if any(getattr(piece, "name", "") == bad for piece in part.pieces):
            assert isinstance(answers[number], NonFiniteError)
            assert bad in str(answers[number])
        else:
            assert PART_RESULT.validate_json(answers[number]).size == part.nbytes


def test_what_is_no_task_fails_with_its_cause(tmp_path: Path) -> None:
    planned, _ = written(tmp_path, llamas())
    (asked,) = payloads(LocalStore(), planned, tmp_path / "out")
    answers = dict(entry.tasks([asked | {"part": "{}"}, asked]))
    assert isinstance(answers[0], MergemillError)
    assert "validation error" in str(answers[0])
    assert PART_RESULT.validate_json(answers[1]).number == 1


def test_streams_share_an_arena_which_has_the_size_that_each_wants(tmp_path: Path) -> None:
    planned, _ = written(tmp_path, llamas())
    (asked,) = payloads(LocalStore(), planned, tmp_path / "out")
    size = asked["arena_bytes"]
    arenas, sizes = set(), []
    for wanted in (size, size, 2 * size, size):
        list(entry.tasks([asked | {"arena_bytes": wanted}]))
        arena = entry._ARENA._arena
        assert arena is not None
        arenas.add(arena)
        sizes.append(arena.nbytes)
    assert len(arenas) == 1
    assert sizes == [padded(wanted) for wanted in (size, size, 2 * size, size)]


def test_an_arena_is_pinned_for_the_device_that_copies_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, _ = written(tmp_path, llamas())
    (asked,) = payloads(LocalStore(), planned, tmp_path / "out")
    events: list[str] = []

    def pin_of(device: str) -> Pin | None:
        def pin(memory: memoryview) -> Callable[[], None]:
            events.append(f"pinned {len(memory)}")
            return lambda: events.append("let go")

        return None if device == "cpu" else pin

    monkeypatch.setattr(entry, "pin_of", pin_of)
    monkeypatch.setattr(entry, "kernels_of", lambda device: kernels_of("cpu"))
    results = []
    for device in ("cpu", "other", "other", "cpu"):
        ((_, value),) = entry.tasks([asked | {"device": device}])
        results.append(PART_RESULT.validate_json(value).digests)
    assert results == results[:1] * 4
    assert events == [f"pinned {padded(asked['arena_bytes'])}", "let go"]


class Watching(LocalStore):
    """Tells what was written how; a write can be held until a later part has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.reads = 0
        self.read_enough = threading.Event()
        self.hold_until = 0

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        super().read_into(uri, start, buffer, etag)
        self.reads += 1
        if self.reads >= self.hold_until:
            self.read_enough.set()

    def put_part(self, upload: Upload, number: int, offset: int, data: Any) -> UploadedPart:
        if self.hold_until:
            assert self.read_enough.wait(30), "nothing was read while a part was being written"
        self.calls.append(("put", number))
        return super().put_part(upload, number, offset, data)

    def copy_part(self, upload: Upload, number: int, *where: Any) -> UploadedPart:
        self.calls.append(("copy", number))
        return super().copy_part(upload, number, *where)


def make(store: Watching, planned: Any, output: Path, arena_bytes: int) -> list[PartResult]:
    uploads = {
        shard.name: store.open_upload(join(from_path(str(output)), shard.name), shard.size, {})
        for shard in planned.plan.shards
    }
    tools = Tools(store, Arena(arena_bytes), kernels_of("cpu"))
    makers = [
        lambda part=part: PartRun(part, uploads[part.shard], {}, tools)  # type: ignore[misc]
        for part in planned.plan.parts
    ]
    results = []
    for _, task in run_tasks(makers):
        assert isinstance(task, PartRun), task
        results.append(task.result)
    for upload in uploads.values():
        store.complete(upload, store.list_parts(upload))
    return results


def big(seed: int) -> Tensors:
    return {f"layers.{n}.w": dyadic(10 * seed + n, 3 * MIB) for n in range(4)}


def test_the_next_parts_are_read_while_one_is_written(tmp_path: Path) -> None:
    models = {"base": big(0), "a": big(1), "b": big(2)}
    planned, parts = written(tmp_path, models, part_bytes=5 * MIB)
    assert len(parts) >= 4
    store = Watching()
    store.hold_until = (
        2 * 3
    )  # the first part is not written before the second has been read: three ranges each
    make(store, planned, tmp_path / "out", planned.plan.price.arena_bytes)
    assert [kind for kind, _ in store.calls] == ["put"] * len(parts)


def test_with_room_for_one_task_they_still_get_through(tmp_path: Path) -> None:
    models = {"base": big(0), "a": big(1), "b": big(2)}
    planned, parts = written(tmp_path, models, part_bytes=5 * MIB)
    least, usual = price(parts, [], 1, 0, 1).arena_bytes, planned.plan.price.arena_bytes
    assert least < usual
    results = make(Watching(), planned, tmp_path / "tight", least)
    loose = make(Watching(), planned, tmp_path / "loose", usual)
    assert [result.digests for result in results] == [result.digests for result in loose]
    assert len(results) == len(parts)


def test_what_is_only_copied_is_copied_by_the_store_and_still_looked_at(tmp_path: Path) -> None:
    tensors = big(1)
    planned, parts = written(tmp_path, {"a": tensors}, "passthrough", part_bytes=16 * MIB)
    store = Watching()
    results = make(store, planned, tmp_path / "out", planned.plan.price.arena_bytes)
    copied = [number for kind, number in store.calls if kind == "copy"]
    assert copied == [part.number for part in parts if part.source]
    assert planned.plan.price.bytes_copied >= 32 * MIB
    assert all(result.digests for result in results)
    merged = (tmp_path / "out" / planned.plan.shards[0].name).read_bytes()
    for name, tensor in tensors.items():
        assert tensor.numpy().tobytes() in merged, name
    tensors["layers.2.w"] = tensors["layers.2.w"].clone()
    tensors["layers.2.w"][7] = float("inf")
    planned, _ = written(tmp_path / "bad", {"a": tensors}, "passthrough", part_bytes=16 * MIB)
    with pytest.raises(AssertionError, match="holds 1 NaN or Inf"):
        make(Watching(), planned, tmp_path / "bad" / "out", planned.plan.price.arena_bytes)
