"""Tasks on real files: the bytes against float64, whole against split, and all that can be wrong with an input."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from service.planning.plan import PlanOptions
from tests.checkpoints import (
    Tensors,
    edge_tensors,
    fine_tune,
    integer_buffers,
    llama_tensors,
    read_checkpoint,
)
from tests.workers.execute import MIB, dyadic, plan, run, write_models
from tests.workers.merges import CASES, NAMES, SPLIT, WHOLE, assert_digests, expected, merge, models, opened
from workers.errors import NonFiniteError, ObjectChangedError, TruncatedReadError
from workers.ranges import coalesce
from workers.run import peak_bytes, run_survey
from workers.store.base import Buffer, Upload, UploadedPart
from workers.store.local import LocalStore
from workers.task import SurveyTask


@pytest.mark.parametrize("case", CASES)
def test_every_method_gives_what_float64_gives_whole_and_split(case: str, tmp_path: Path) -> None:
    made = models(3, 1_400_003)  # 16 MiB, off every block
    write_models(tmp_path, made)
    whole = merge(tmp_path, case, WHOLE, "whole")
    assert not whole.planned.plan.surveys
    flat = {name: tensors["w"].double().numpy().reshape(-1) for name, tensors in made.items()}
    found = opened(whole)["w"]
    assert found.shape == (3, 1_400_003)
    np.testing.assert_allclose(found.double().numpy().reshape(-1), expected(case, flat), rtol=2e-6, atol=2e-6)
    for part_bytes in (5 * MIB, 7 * MIB + 1):
        options = SPLIT.model_copy(update={"part_bytes": part_bytes})
        split = merge(tmp_path, case, options, f"split{part_bytes}", order=part_bytes)
        assert len(split.planned.plan.parts) >= 2
        assert bool(split.planned.plan.surveys) is (case in ("ties", "slerp", "dare_l1"))
        assert split.shards() == whole.shards()
        assert_digests(split)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mixed_dtypes_are_computed_in_float32_and_rounded_once(dtype: str, tmp_path: Path) -> None:
    mixed = [torch.bfloat16, torch.float16, torch.float32]
    made = {
        name: {"w": dyadic(seed, 999, dtype=mixed[seed % 3])} for seed, name in enumerate(["base", *NAMES])
    }
    write_models(tmp_path, made)
    done = merge(tmp_path, "task_arithmetic", WHOLE, "out", out_dtype=dtype)
    flat = {name: tensors["w"].double().numpy() for name, tensors in made.items()}
    exact = torch.from_numpy(expected("task_arithmetic", flat))
    found = opened(done)["w"]
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, exact.to(torch.float32).to(found.dtype))  # sums of dyadics are exact


def test_a_llama_with_edge_cases_and_buffers_goes_through_and_results_say_what_was_done(
    tmp_path: Path,
) -> None:
    base = llama_tensors(1) | edge_tensors(1) | integer_buffers()
    made = {"base": base} | {name: fine_tune(base, seed) for seed, name in enumerate(NAMES)}
    write_models(tmp_path, {name: made[name] for name in ("a", "c")})
    write_models(tmp_path, {name: made[name] for name in ("base", "b")}, shard_bytes=60_000)
    done = merge(tmp_path, "ties", PlanOptions(shard_bytes=100_000, worker_memory_bytes=1 << 40), "out")
    assert len(done.planned.plan.shards) > 3
    found = opened(done)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in base.items()
    }
    for name in integer_buffers():
        assert torch.equal(found[name], base[name])
    for name in ("edge.scalar", "edge.one", "model.norm.weight"):
        flat = {model: tensors[name].double().numpy().reshape(-1) for model, tensors in made.items()}
        merged = found[name].double().numpy().reshape(-1)
        np.testing.assert_allclose(merged, expected("ties", flat), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], base[name])
    assert_digests(done)
    for part, result in zip(done.planned.plan.parts, done.results, strict=True):
        assert (result.shard, result.number, result.size) == (part.shard, part.number, part.nbytes)
        assert result.nonfinite == {}
        assert set(result.seconds) == {"read", "merge", "digest", "write"}
        assert 0 < result.peak_bytes <= peak_bytes()
    assert sum(result.bytes_read for result in done.results) == done.planned.plan.price.bytes_read
    assert sum(result.size for result in done.results) == done.planned.plan.price.bytes_written


def test_inputs_at_odd_places_in_their_files_are_read_right(tmp_path: Path) -> None:
    """The format allows a header of any length, and a boolean in front of a float."""
    made = models(1003)
    write_models(tmp_path, made)
    for pad, name in enumerate(made, start=1):
        path = tmp_path / name / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = data[8 : 8 + length].rstrip() + b" " * pad
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    starts = {
        model.tensors["w"].ref.start % 4
        for model in plan(tmp_path, "ties", NAMES, {}, WHOLE).inputs.models.values()
    }
    assert starts - {0}
    done = merge(tmp_path, "ties", WHOLE, "out")
    flat = {name: tensors["w"].double().numpy() for name, tensors in made.items()}
    np.testing.assert_allclose(
        opened(done)["w"].double().numpy(), expected("ties", flat), rtol=2e-6, atol=2e-6
    )


def test_a_float_behind_a_boolean_in_one_read_is_read_right(tmp_path: Path) -> None:
    text = b'{"b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]},'
    text += b'"w":{"dtype":"F32","shape":[5],"data_offsets":[3,23]}}'
    values = torch.arange(5, dtype=torch.float32) + 0.5
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        body = bytes([1, 0, 1]) + values.numpy().tobytes()
        (tmp_path / name / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    done = run(plan(tmp_path, "linear", ["a", "b"], {}, WHOLE), tmp_path / "out")
    assert torch.equal(opened(done)["w"], values)
    assert opened(done)["b"].tolist() == [True, False, True]


def test_copied_tensors_are_copied_to_the_bit_whole_and_in_pieces(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    raw = {
        "w": dyadic(1, 3_000_001),
        "i": torch.randint(-(2**62), 2**62, (1_500_001,), generator=generator),
        "d": torch.randn(1001, generator=generator).double(),
        "z": torch.tensor([-0.0, 0.0]),
    }
    write_models(tmp_path, {"a": raw})
    for number, options in enumerate((WHOLE, SPLIT)):
        done = run(plan(tmp_path, "passthrough", ["a"], {}, options), tmp_path / str(number))
        for name, found in opened(done).items():
            assert torch.equal(found.view(torch.uint8), raw[name].view(torch.uint8)), name
        assert_digests(done)
    assert len(done.planned.plan.parts) > 3


# --- what is not finite -------------------------------------------------------------------------------------


def poisoned(tmp_path: Path, count: int = 3_000_000) -> dict[str, Tensors]:
    made = models(count)
    made["b"]["w"][7] = math.nan
    made["b"]["w"][count - 1] = -math.inf
    made["base"]["w"][9] = math.inf
    write_models(tmp_path, made)
    return made


@pytest.mark.parametrize("case", ["ties", "linear", "slerp", "dare_l1", "passthrough"])
def test_nan_and_infinity_are_errors_that_name_tensor_model_and_count(case: str, tmp_path: Path) -> None:
    made = models(1000)
    made["a" if case == "passthrough" else "b"]["w"][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    write_models(tmp_path, made)
    model = tmp_path / ("a" if case == "passthrough" else "b")
    with pytest.raises(NonFiniteError) as caught:
        merge(tmp_path, case, WHOLE, "out")
    assert f"tensor 'w' of file://{model} holds 3 NaN or Inf" in str(caught.value)
    assert "allow_nonfinite" in str(caught.value)


def test_every_input_with_something_that_is_not_finite_is_named_at_once(tmp_path: Path) -> None:
    poisoned(tmp_path, 1000)
    with pytest.raises(NonFiniteError) as caught:
        merge(tmp_path, "ties", WHOLE, "out")
    assert f"file://{tmp_path}/base holds 1 NaN" in str(caught.value)
    assert f"file://{tmp_path}/b holds 2 NaN" in str(caught.value)


def test_a_survey_finds_it_too(tmp_path: Path) -> None:
    poisoned(tmp_path)
    planned = plan(tmp_path, "ties", NAMES, {"density": 0.3}, SPLIT)
    (survey,) = planned.plan.surveys
    task = SurveyTask(survey.id, 0, survey.tasks[0], {})
    with pytest.raises(NonFiniteError, match="holds 1 NaN"):
        run_survey(task, LocalStore())


@pytest.mark.parametrize("case", ["ties", "linear", "dare_l1", "slerp"])
def test_allowed_it_stays_where_it_is_and_is_counted(case: str, tmp_path: Path) -> None:
    made = poisoned(tmp_path)
    done = merge(tmp_path, case, WHOLE.model_copy(update={"allow_nonfinite": True}), "out")
    found = opened(done)["w"]
    wrong = torch.nonzero(~torch.isfinite(found)).flatten().tolist()
    places = {7, 2_999_999} | ({9} if CASES[case][0] in ("ties", "dare_linear") else set())
    assert set(wrong) <= places
    assert 7 in wrong
    assert found[7].view(torch.int32) == 0x7FC00000
    counts: dict[str, int] = {}
    for result in done.results:
        for key, count in result.nonfinite.items():
            counts[key] = counts.get(key, 0) + count
    assert counts[f"w: file://{tmp_path}/b"] == 2
    split = merge(tmp_path, case, SPLIT.model_copy(update={"allow_nonfinite": True}), "split")
    assert split.shards() == done.shards()
    if case == "linear":  # all else is as if nothing had been wrong
        flat = {name: tensors["w"].double().numpy() for name, tensors in made.items()}
        fine = torch.isfinite(found).numpy()
        np.testing.assert_allclose(
            found.double().numpy()[fine], expected(case, flat)[fine], rtol=2e-6, atol=2e-6
        )


def test_a_model_that_is_listed_twice_is_counted_once(tmp_path: Path) -> None:
    poisoned(tmp_path, 1000)
    with pytest.raises(NonFiniteError, match="b holds 2 NaN"):
        run(plan(tmp_path, "linear", ["b", "b"], {}, WHOLE), tmp_path / "out")


def test_an_output_that_its_dtype_cannot_hold_is_reported(tmp_path: Path) -> None:
    write_models(
        tmp_path, {name: {"big.weight": torch.tensor([1.0, 65504.0, 65520.0, -1e30])} for name in ("a", "b")}
    )
    with pytest.raises(NonFiniteError, match=r"2 merged value\(s\) of tensor 'big\.weight' overflow F16"):
        run(plan(tmp_path, "linear", ["a", "b"], {}, WHOLE, out_dtype="float16"), tmp_path / "out")
    allowed = WHOLE.model_copy(update={"allow_nonfinite": True})
    done = run(plan(tmp_path, "linear", ["a", "b"], {}, allowed, out_dtype="float16"), tmp_path / "out2")
    assert opened(done)["big.weight"].tolist() == [1.0, 65504.0, math.inf, -math.inf]
    assert done.results[0].nonfinite == {"big.weight: output": 2}


def test_a_float32_sum_that_overflows_is_reported(tmp_path: Path) -> None:
    write_models(tmp_path, {name: {"w": torch.tensor([3e38, 1.0])} for name in ("a", "b")})
    with pytest.raises(NonFiniteError, match=r"1 merged value\(s\) of tensor 'w' overflow F32"):
        run(plan(tmp_path, "linear", ["a", "b"], {"normalize": False}, WHOLE), tmp_path / "out")


# --- inputs that are not what they were ---------------------------------------------------------------------


def test_an_input_that_was_replaced_is_noticed_and_nothing_is_written(tmp_path: Path) -> None:
    made = models(1000)
    write_models(tmp_path, made)
    planned = plan(tmp_path, "ties", NAMES, {}, WHOLE)
    replaced = tmp_path / "b" / "model.safetensors"
    data = bytearray(replaced.read_bytes())
    data[-1] ^= 1
    (tmp_path / "new").write_bytes(data)
    (tmp_path / "new").replace(replaced)
    with pytest.raises(ObjectChangedError, match=r"b/model\.safetensors"):
        run(planned, tmp_path / "out")


class Shortened(LocalStore):
    """A store whose connection breaks off."""

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        raise TruncatedReadError(f"{uri} ended early")


class Watched(LocalStore):
    """A store that remembers what was read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []
        self.puts: list[int] = []

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        assert etag is not None, "a read that is not pinned"
        self.reads.append((uri, start, len(buffer)))
        super().read_into(uri, start, buffer, etag)

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        self.puts.append(number)
        return super().put_part(upload, number, offset, data)


def test_a_truncated_read_is_an_error(tmp_path: Path) -> None:
    write_models(tmp_path, models(1000))
    with pytest.raises(TruncatedReadError, match="ended early"):
        run(plan(tmp_path, "ties", NAMES, {}, WHOLE), tmp_path / "out", Shortened())


def test_nothing_is_uploaded_when_an_input_is_not_finite(tmp_path: Path) -> None:
    poisoned(tmp_path, 1000)
    store = Watched()
    with pytest.raises(NonFiniteError):
        run(plan(tmp_path, "ties", NAMES, {}, WHOLE), tmp_path / "out", store)
    assert store.puts == []


def test_every_byte_is_read_once_pinned_and_neighbours_together(tmp_path: Path) -> None:
    base = llama_tensors(1)
    write_models(tmp_path, {"base": base} | {name: fine_tune(base, seed) for seed, name in enumerate(NAMES)})
    planned = plan(tmp_path, "ties", NAMES, {"density": 0.3}, WHOLE)
    store = Watched()
    run(planned, tmp_path / "out", store)
    assert len(store.reads) == 4  # one range a model: all tensors are neighbours
    assert sum(size for *_, size in store.reads) == planned.plan.price.bytes_read
    assert {uri for uri, *_ in store.reads} == {
        run_.uri
        for part in planned.plan.parts
        for piece in part.pieces[1:]
        for run_ in coalesce(piece.arithmetic.refs)  # type: ignore[union-attr]
    }


def test_a_part_made_twice_has_the_same_bytes_and_result(tmp_path: Path) -> None:
    write_models(tmp_path, models(1000))
    first, again = (merge(tmp_path, "dare_ties", WHOLE, f"out{i}") for i in range(2))
    assert first.shards() == again.shards()
    assert [r.digests for r in first.results] == [r.digests for r in again.results]
    assert read_checkpoint(tmp_path / "a")["w"].equal(
        models(1000)["a"]["w"]
    )  # and the inputs are as they were
