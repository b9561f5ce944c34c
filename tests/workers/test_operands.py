"""Operands that are made: the same bits however a tensor is cut, in exactly the memory that is said, and all told."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.made import Objects, bits, sources
from workers.arena import padded
from workers.inputs import Inputs
from workers.kernels import kernels_of
from workers.nonfinite import NonFinite
from workers.operands import Bench
from workers.scratch import SCRATCH_ALIGNMENT, scratch_bytes
from workers.sources import (
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    ModelInput,
    RowRun,
    Source,
    TensorRef,
)

NAN, INF = float("nan"), float("inf")


def arithmetic(source: Source, numel: int) -> Arithmetic:
    """A merge of it and itself, so that two operands are held at once."""
    models = (ModelInput(0, source, {"weight": 1.0}), ModelInput(1, source, {"weight": 1.0}))
    return Arithmetic("w", "linear", {}, None, models, 7, numel, 0, numel)


def made(
    run: Arithmetic, objects: Objects, problems: NonFinite | None = None, less: int = 0
) -> tuple[torch.Tensor, ...]:
    """The models' elements, made in as much scratch memory as is said, less some, with NaN in it before."""
    inputs = Inputs(run.refs)
    inputs.fetch(objects, memoryview(bytearray(padded(inputs.nbytes))))  # type: ignore[arg-type]
    size = scratch_bytes(run.sources) - less
    scratch = torch.full((size + SCRATCH_ALIGNMENT,), 0xFF, dtype=torch.uint8)
    begin = -scratch.data_ptr() % SCRATCH_ALIGNMENT
    view = memoryview(scratch.numpy())[begin : begin + size]
    return (
        Bench(inputs, view, kernels_of("cpu"), NonFinite() if problems is None else problems)
        .operands(run)
        .models
    )


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([(1, 1), (1, 7), (6, 5), (9, 33)]))
def test_every_run_of_every_source_is_that_of_the_whole_in_just_the_memory_that_is_said(
    data: st.DataObject, shape: tuple[int, int]
) -> None:
    objects, numel = Objects(), shape[0] * shape[1]
    source = data.draw(sources(objects, *shape))
    wanted = objects.value(source)
    whole = arithmetic(source, numel)
    cuts = data.draw(st.lists(st.integers(0, numel), max_size=3))
    for first, last in itertools.pairwise(sorted({0, *cuts, numel})):
        run = whole.elements(first, last)
        one, two = made(run, objects)
        assert bits(one) == bits(two) == bits(wanted[first:last])
        assert one.dtype == wanted.dtype
        if scratch_bytes(run.sources):
            with pytest.raises(ValueError, match="scratch"):
                made(run, objects, less=SCRATCH_ALIGNMENT)


def test_a_copied_row_keeps_its_bits_and_a_mean_is_divided_in_float32() -> None:
    objects = Objects()
    rows = torch.tensor([[-0.0, 1e-40, 3.0], [1.0, 65504.0, 2.0], [1.0, 65504.0, 2.25]])
    table = objects.add(rows.half(), "F16")
    runs = (RowRun(3, ((0, 0),)), RowRun(3, ((0, 3), (0, 6), (0, 0))), RowRun(2, ()))
    (found, _) = made(arithmetic(Gathered("gathered", (table,), runs, "F16"), 8), objects)
    third = torch.tensor([2.0, 131008.0, 7.25]) / torch.tensor([3.0])
    assert found.tolist() == [-0.0, 0.0, 3.0, *third.half().tolist(), 0.0, 0.0]
    assert torch.signbit(found[0])


# --- what should not be there -----------------------------------------------------------------------------


def told(source: Source, objects: Objects, numel: int = 12) -> dict[str, int]:
    """What is counted while both operands are made, by the last part of its key."""
    problems = NonFinite()
    made(arithmetic(source, numel), objects, problems)
    return {key.removeprefix("w: "): count for key, count in problems.counts.items()}


@pytest.fixture
def objects() -> Objects:
    """Models ``good``, ``bad`` (a NaN at 1, infinities at 7 and 11) and ``big`` (near the end of float16's range)."""
    made_ = Objects()
    bad = torch.ones(12)
    bad[1], bad[7], bad[11] = NAN, INF, -INF
    for name, tensor in (("good", torch.ones(12)), ("bad", bad), ("big", torch.full((12,), 65504.0))):
        made_.add(tensor, "F16", uri=f"s3://{name}/model.safetensors")
    return made_


def of(name: str, numel: int = 12, dtype: str = "F16") -> TensorRef:
    """A model's tensor."""
    return TensorRef(f"s3://{name}/model.safetensors", "e", 0, 2 * numel, dtype)


def adapted(source: Source, change: Change | None = None) -> LowRank:
    """A matrix of 3 by 4 under an adapter."""
    change = change or Change(of("good", 4), of("good", 3), 1.0, False)
    return LowRank("low_rank", source, (change,), (3, 4), 0)


def merged(*models: Source, base: Source | None = None, **own: float) -> Derived:
    """A merge of models on a base, or their sum; ``own`` are each model's parameters."""
    method = "linear" if base is None else "dare_linear"
    inputs = tuple(ModelInput(k, model, {"weight": 1.0, **own}) for k, model in enumerate(models))
    shared = {"normalize": False} if base is None else {}
    return Derived("derived", Arithmetic("w", method, shared, base, inputs, 7, 12, 0, 12), "F16")


def gathered(source: Source, *takes: tuple[tuple[int, int], ...]) -> Gathered:
    """Rows of four elements."""
    return Gathered("gathered", (source, of("good")), tuple(RowRun(4, take) for take in takes), "F16")


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        (adapted(of("good")), {}),
        (adapted(of("bad")), {"s3://bad": 3}),
        (adapted(of("good"), Change(of("bad", 4), of("good", 3), 1.0, False)), {"s3://bad": 1}),
        (adapted(of("good"), Change(of("good", 4), of("bad", 3), 0.0, False)), {"s3://bad": 1}),
        (adapted(of("bad"), Change(of("bad", 3), of("good", 4), 1.0, True)), {"s3://bad": 3 + 1}),
        (adapted(of("big"), Change(of("big", 4), of("good", 3), 1.0, False)), {"operand": 12}),
        (gathered(of("bad"), ((0, 0),), (), ((0, 4),)), {"s3://bad": 2}),
        (gathered(of("bad"), ((0, 2),), ((1, 0),), ()), {}),  # what lies between is read, and not used
        (gathered(of("bad"), ((0, 0), (1, 0)), (), ((1, 4), (0, 8), (1, 0))), {"s3://bad": 2}),
        (gathered(adapted(of("bad")), ((0, 4),), ((0, 8), (1, 0)), ()), {"s3://bad": 2}),
        (merged(of("good"), of("bad")), {"s3://bad": 3}),
        (merged(of("bad"), of("bad")), {"s3://bad": 3}),  # listed twice
        (merged(of("big"), of("big")), {"operand": 12}),
        # Dropped from the outcome, but for NaN; and told all the same.
        (merged(of("bad"), base=of("good"), density=0.0), {"s3://bad": 3}),
        (merged(adapted(of("bad")), gathered(of("bad"), ((0, 0),), (), ())), {"s3://bad": 4}),
        (adapted(merged(of("good"), of("bad"))), {"s3://bad": 3}),
        (adapted(merged(of("good"), of("good"))), {}),
        (
            adapted(merged(of("big"), of("good")), Change(of("big", 4), of("good", 3), 1.0, False)),
            {"operand": 12},
        ),
    ],
)
def test_nan_and_infinities_are_told_of_the_files_that_hold_them(
    source: Source, counts: dict[str, int], objects: Objects
) -> None:
    assert told(source, objects) == {key: 2 * count for key, count in counts.items()}  # of two operands


def test_what_overflows_before_the_merge_is_told_as_that(objects: Objects) -> None:
    problems = NonFinite()
    made(arithmetic(merged(of("big"), of("big")), 12), objects, problems)
    assert str(problems.error()).startswith("24 value(s) of tensor 'w' overflow F16 before they are merged")


def test_an_earlier_merge_that_needs_its_whole_tensor_is_no_operand(objects: Objects) -> None:
    source = merged(of("good"), base=of("good"), density=0.5)
    surveyed = replace(source.arithmetic, method="ties")
    with pytest.raises(ValueError, match="ties of w needs its whole tensor"):
        made(arithmetic(replace(source, arithmetic=surveyed), 12), objects)
