"""What the CUDA layer asks of ``torch.cuda``, with a stand-in for it: what is said to the runtime, not what it does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.workers.kernels.test_conveyor import BLOCK, CPU, everything, long_run
from workers.arena import Arena
from workers.errors import FleetError
from workers.kernels import kernels_of, pin_of
from workers.kernels.base import Election, Formula, Term
from workers.kernels.conveyor import Conveyor
from workers.kernels.gpu import CudaLanes, pin
from workers.kernels.moves import device_bytes

FORMULA = Formula((Term(0, 0.5, 1 << 31, 2.0), Term(1, threshold=0x3C000000)), True, Election(1, "count"))


class Event:
    """One end of work; nothing waits for it before it is recorded."""


class Stream:
    """Says what is asked of it."""

    def __init__(self, said: list[tuple[str, Any, Any]], name: str) -> None:
        self.said, self.name = said, name

    def wait_event(self, event: Event) -> None:
        assert ("record", event) in [(what, which) for what, _, which in self.said]
        self.said.append(("wait", self.name, event))

    def record_event(self) -> Event:
        event = Event()
        self.said.append(("record", self.name, event))
        return event

    def synchronize(self) -> None:
        self.said.append(("synchronize", self.name, None))


class Runtime:
    """``cudart``: what is pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.refuses = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's own name
        assert flags == 1
        if not self.refuses:
            self.pinned[address] = nbytes
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's own name
        return 1 if self.pinned.pop(address, None) is None else 0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """What streams are asked, in order, with a ``torch.cuda`` that has two streams besides the caller's."""
    said: list[tuple[str, Any, Any]] = []
    names = iter(["send", "fetch"])

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        said.append(("begin", stream.name, None))
        yield
        said.append(("end", stream.name, None))

    stands_in: dict[str, Callable[..., Any] | type] = {
        "Event": Event,
        "Stream": lambda device: Stream(said, next(names)),
        "current_stream": lambda device: Stream(said, "compute"),
        "stream": on,
        "empty_cache": lambda: said.append(("empty_cache", None, None)),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return said


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime that pins."""

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        yield

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", device)
    return runtime


def test_a_lane_is_a_stream_that_waits_then_works_then_records(said: list[tuple[str, Any, Any]]) -> None:
    lanes = CudaLanes(CPU)
    first = lanes.run("compute", lambda: said.append(("made", None, None)))
    second = lanes.run("send", lambda: said.append(("sent", None, None)), [first])
    lanes.run("fetch", lambda: said.append(("fetched", None, None)), [second, first])
    assert said == [
        ("begin", "compute", None), ("made", None, None), ("record", "compute", first), ("end", "compute", None),
        ("wait", "send", first),
        ("begin", "send", None), ("sent", None, None), ("record", "send", second), ("end", "send", None),
        ("wait", "fetch", second), ("wait", "fetch", first),
        ("begin", "fetch", None), ("fetched", None, None), said[-2], ("end", "fetch", None),
    ]  # fmt: skip
    said.clear()
    lanes.join()
    assert sorted(said) == [("synchronize", name, None) for name in ("compute", "fetch", "send")]
    with pytest.raises(TypeError, match="lane"):
        lanes.run("send", lambda: None, [None])


def test_what_is_carried_over_streams_is_the_same(said: list[tuple[str, Any, Any]]) -> None:
    run = long_run(4, 3, 7, 2, True)
    wanted = everything(None, run, FORMULA, torch.bfloat16)
    assert everything(Conveyor(CPU, CudaLanes(CPU), BLOCK), run, FORMULA, torch.bfloat16) == wanted
    assert {name for what, name, _ in said if what == "begin"} == {"send", "compute", "fetch"}


def test_room_is_made_in_one_piece_and_only_when_it_grows(
    said: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = CudaLanes(CPU)
    for nbytes in (100, 50, 100, 200, 150):
        lanes.reserve(nbytes)
    assert said == [("empty_cache", None, None)] * 2
    asked: list[int] = []
    monkeypatch.setattr(lanes, "reserve", asked.append)
    run = long_run(4, 3, 7, 2, True)
    everything(Conveyor(CPU, lanes, 2 * BLOCK), run, FORMULA, torch.bfloat16)
    widths = [x.element_size() for x in run.inputs]
    assert max(asked) == asked[0] == device_bytes(run.numel, widths, 2, 2 * BLOCK)


def test_memory_is_pinned_whole_and_let_go_once(runtime: Runtime) -> None:
    memory = bytearray(12_345)
    unpin = pin(torch.device("cuda"), memoryview(memory))
    assert list(runtime.pinned.values()) == [12_345]
    unpin()
    assert not runtime.pinned


def test_an_arena_is_pinned_for_as_long_as_it_is_there(runtime: Runtime) -> None:
    assert pin_of("cpu") is None
    arena = Arena(1 << 20, pin_of("cuda"))
    assert list(runtime.pinned.values()) == [1 << 20]
    (extent,) = arena.take([100])
    assert torch.frombuffer(extent.view, dtype=torch.uint8).data_ptr() in runtime.pinned
    arena.give_back(extent)
    del arena, extent
    gc.collect()
    assert not runtime.pinned


def test_a_refusal_is_told(runtime: Runtime) -> None:
    runtime.refuses = 2
    with pytest.raises(FleetError, match=r"pin 4096 bytes.*error 2.*MERGEMILL_GPU_MEMORY_BYTES=0"):
        Arena(1, pin_of("cuda"))


def test_a_device_gets_torch_and_streams(said: list[tuple[str, Any, Any]]) -> None:
    kernels: Any = kernels_of("cuda")
    assert kernels._carrier.device == torch.device("cuda")
    assert isinstance(kernels._carrier._lanes, CudaLanes)
