"""Parts that only copy: the bytes and their digests, wherever their source lies, and what stores cannot do."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.planning.plan import PlanOptions
from tests.workers.execute import MIB, dyadic, plan, run
from tests.workers.merges import assert_digests
from workers.errors import NonFiniteError, ObjectChangedError, StoreError
from workers.store.base import Upload, UploadedPart
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

OPTIONS = PlanOptions(part_bytes=5 * MIB, worker_memory_bytes=1 << 40)
DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}


def write(root: Path, tensors: Mapping[str, torch.Tensor], pad: int) -> None:
    """A checkpoint whose header has ``pad`` spaces more than it needs: the format allows any number."""
    entries: dict[str, Any] = {}
    bodies, end = [], 0
    for name, tensor in tensors.items():
        body = tensor.view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(body)],
        }
        end += len(body)
        bodies.append(body)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8 + pad)
    root.mkdir(parents=True)
    (root / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"".join(bodies))


def tensors() -> dict[str, torch.Tensor]:
    """In the order of the output; the first fills the part with the header, the last is too short to be copied."""
    return {
        "a": torch.arange(6 * MIB // 8),
        "b": torch.arange(129),
        "c": dyadic(1, 6 * MIB // 4 + 1),
        "d": dyadic(2, 6 * MIB // 2 + 1).bfloat16(),
        "e": dyadic(3, 1001).bfloat16(),
    }


class Counting(LocalStore):
    """Tells which parts came as bytes, and may be unable to copy."""

    def __init__(self, fails: StoreError | None = None) -> None:
        super().__init__()
        self.put: list[int] = []
        self.copied: list[int] = []
        self._fails = fails

    def put_part(self, upload: Upload, number: int, offset: int, data: Any) -> UploadedPart:
        self.put.append(number)
        return super().put_part(upload, number, offset, data)

    def copy_part(self, upload: Upload, number: int, *where: Any) -> UploadedPart:
        self.copied.append(number)
        if self._fails is not None:
            raise self._fails
        return super().copy_part(upload, number, *where)


@pytest.fixture(params=range(9), ids=lambda pad: f"pad{pad}")
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    write(tmp_path / "m", tensors(), request.param)
    yield tmp_path


def check(root: Path, store: Counting) -> None:
    planned = plan(root, "passthrough", ["m"], {}, OPTIONS)
    sources = [part.number for part in planned.plan.parts if part.source]
    assert len(sources) >= 2
    done = run(planned, root / "out", store)
    assert_digests(done)
    (shard,) = planned.plan.shards
    found = load_file(root / "out" / shard.name)
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor), name
    assert sum(result.bytes_read for result in done.results) == planned.plan.price.bytes_read


def test_any_place_in_the_source_is_copied_right(model: Path) -> None:
    store = Counting()
    check(model, store)
    assert store.copied
    assert 1 in store.put
    assert max(store.put) > max(store.copied)  # the last is too short for S3 to copy


def test_where_a_store_cannot_copy_the_bytes_are_sent(model: Path) -> None:
    store = Counting(StoreError("no such request"))
    check(model, store)
    assert {*store.copied} < {*store.put}


def test_a_source_that_has_changed_is_no_reason_to_send_its_old_bytes(tmp_path: Path) -> None:
    write(tmp_path / "m", tensors(), 0)
    with pytest.raises(ObjectChangedError):
        check(tmp_path, Counting(ObjectChangedError("changed")))


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("name", ["c", "d", "e"])
def test_what_is_not_finite_is_found_in_a_copy(tmp_path: Path, name: str, pad: int) -> None:
    bad = tensors()
    bad[name][-1] = float("nan")
    bad[name][-2] = float("inf")
    write(tmp_path / "m", bad, pad)
    with pytest.raises(NonFiniteError, match=f"'{name}'.* holds 2 NaN or Inf"):
        run(plan(tmp_path, "passthrough", ["m"], {}, OPTIONS), tmp_path / "out")


def test_merged_parts_are_written_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pages lie in memory as they do in the file: all but the first and the last go past the page cache."""
    from workers.store import direct

    went: list[int] = []
    write_pages = direct._write_pages

    def watched(path: Path, offset: int, view: memoryview) -> int:
        done = write_pages(path, offset, view)
        went.append(len(view))
        return done

    monkeypatch.setattr(direct, "_write_pages", watched)
    write(tmp_path / "m", {"w": dyadic(1, 4 * MIB + 3)}, 0)
    write(tmp_path / "n", {"w": dyadic(2, 4 * MIB + 3)}, 0)
    planned = plan(tmp_path, "linear", ["m", "n"], {}, OPTIONS)
    run(planned, tmp_path / "out")
    assert len(planned.plan.parts) > 2
    assert sum(went) > planned.plan.price.bytes_written - 2 * 4096 * len(planned.plan.parts)
