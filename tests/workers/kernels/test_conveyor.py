"""Steps, chunks and lanes change no bit; what is on a device at once is bounded, and priced."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.kernels.formulas import DTYPES, elements, merged, statistics, terms
from tests.workers.kernels.lanes import LateLanes
from workers.canonical import SURVEY_ELEMENTS
from workers.kernels.base import PAIR, PAIRS, Election, Formula, Operands, Term
from workers.kernels.conveyor import Carrier, Conveyor, InPlace, Lanes
from workers.kernels.cpu import FusedKernels
from workers.kernels.moves import MADE, Lane, chunks, device_bytes, moves
from workers.kernels.program import Writer
from workers.kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")
BLOCK = SURVEY_ELEMENTS


# --- where a run is cut -----------------------------------------------------------------------------------


@given(
    first=st.integers(0, 9),
    numel=st.integers(0, 5 * BLOCK),
    step=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 15), max_size=3),
)
def test_chunks_are_the_run_in_whole_blocks_and_cuts_are_alone(
    first: int, numel: int, step: int, cuts: list[int]
) -> None:
    found = chunks(first * BLOCK, numel, step * BLOCK, cuts)
    assert [at for where in found for at in (where.start, where.stop)] == sorted(
        at for pair in itertools.pairwise([0, *(where.stop for where in found)]) for at in pair
    )
    assert sum(where.stop - where.start for where in found) == numel
    for where in found:
        blocks = range(first + where.start // BLOCK, first + -(-where.stop // BLOCK))
        assert where.start % BLOCK == 0
        assert 1 <= len(blocks) <= step
        assert len(blocks) == 1 or not set(cuts) & set(blocks)


@pytest.mark.parametrize("step", [0, -BLOCK, BLOCK - 1, BLOCK + 1])
def test_a_step_is_whole_blocks(step: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        InPlace(step)
    with pytest.raises(ValueError, match="multiple"):
        Conveyor(CPU, Lanes(), step)


# --- what waits for what ----------------------------------------------------------------------------------


@given(count=st.integers(0, 12), slots=st.integers(2, 4), fetches=st.booleans())
def test_a_slot_is_used_by_one_chunk_at_a_time(count: int, slots: int, fetches: bool) -> None:
    asked = list(moves(count, slots, fetches))
    lanes: list[Lane] = ["send", "compute", *(["fetch"] if fetches else [])]  # type: ignore[list-item]
    assert sorted((move.lane, move.chunk) for move in asked) == sorted(
        (lane, chunk) for lane in lanes for chunk in range(count)
    )
    before: dict[tuple[Lane, int], set[tuple[Lane, int]]] = {("compute", MADE): set()}
    last: dict[Lane, tuple[Lane, int]] = {"compute": ("compute", MADE)}
    for move in asked:
        held_up_by = {*move.after, *([last[move.lane]] if move.lane in last else [])}
        assert held_up_by <= before.keys()  # asked for already: a wait for the future would be for ever
        last[move.lane] = (move.lane, move.chunk)
        before[last[move.lane]] = held_up_by.union(*(before[end] for end in held_up_by))
    for chunk in range(count):
        assert ("compute", MADE) in before["send", chunk]
        assert ("send", chunk) in before["compute", chunk]
        if fetches:
            assert ("compute", chunk) in before["fetch", chunk]
        if chunk >= slots:
            assert ("compute", chunk - slots) in before["send", chunk]
            assert not fetches or ("fetch", chunk - slots) in before["compute", chunk]


def test_copies_go_on_beside_the_arithmetic() -> None:
    asked = {(move.lane, move.chunk): move for move in moves(9, 2, True)}
    order = list(asked)
    for chunk in range(1, 8):
        assert order.index(("send", chunk + 1)) < order.index(("compute", chunk))
        waits = asked["send", chunk + 1].after + asked["compute", chunk].after
        assert ("compute", chunk) not in waits
        assert ("fetch", chunk - 1) not in waits


# --- the same bits ----------------------------------------------------------------------------------------


def long_run(seed: int, blocks: int, extra: int, models: int, base: bool) -> Operands:
    rng = np.random.default_rng(seed)
    numel = blocks * BLOCK + extra
    kinds = rng.choice(["coarse", "ordinary", "ordinary", "odd"], models + 1)
    made = [elements(kind, numel, DTYPES[int(rng.integers(3))], rng) for kind in kinds]
    first = int(rng.choice([0, 1, 1 << 17])) * BLOCK
    keys = tuple(int(key) for key in rng.integers(0, 1 << 63, models))
    return Operands(first, made[0] if base else None, tuple(made[1:]), keys)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Operands, Formula, torch.dtype]:
    """A run of one to four blocks; thresholds are cut in any of them."""
    base = draw(st.booleans())
    blocks, extra = draw(st.sampled_from([(0, 5), (1, 0), (1, 1), (2, 777), (2, BLOCK - 1)]))
    run = long_run(draw(st.integers(0, 1 << 20)), blocks, extra, draw(st.integers(1, 3)), base)
    found = []
    for term in draw(terms(run, base)):
        block = run.first // BLOCK + draw(st.integers(0, blocks))
        cut = None if term.cut is None else (block, draw(st.sampled_from([0, 1, 1000, 1 << 20])))
        found.append(replace(term, cut=cut))
    election = draw(st.sampled_from([None, Election(-1, "weights"), Election(1, "abs_weights")]))
    return run, Formula(tuple(found), base, election, lambda_=0.7), draw(st.sampled_from(DTYPES))


def everything(
    carrier: Carrier | None, run: Operands, formula: Formula, dtype: torch.dtype
) -> tuple[Any, Any]:
    kernels = TorchKernels(carrier)
    return merged(kernels, run, formula, dtype), statistics(kernels, run, formula)


@settings(max_examples=6)
@given(problem=problems(), step=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_step_any_device_and_the_compiled_kernels_agree(
    problem: tuple[Operands, Formula, torch.dtype], step: int, seed: int
) -> None:
    run, formula, dtype = problem
    wanted = everything(None, run, formula, dtype)
    assert (merged(FusedKernels(), *problem), statistics(FusedKernels(), run, formula)) == wanted
    carriers: list[Carrier] = [
        InPlace(step * BLOCK),
        Conveyor(CPU, Lanes(), step * BLOCK),
        Conveyor(CPU, LateLanes(seed), step * BLOCK),
    ]
    for carrier in carriers:
        assert everything(carrier, run, formula, dtype) == wanted


@pytest.mark.parametrize("carrier", [InPlace(BLOCK), Conveyor(CPU, LateLanes(3), 2 * BLOCK)])
def test_statistics_go_with_their_models(carrier: Carrier) -> None:
    rng = np.random.default_rng(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float16, torch.float32)
    base, *made = (elements("ordinary", 3 * BLOCK + 9, dtype, rng) for dtype in dtypes)
    run = Operands(0, base, tuple(made[:2]), (), tuple(made[2:]))
    writer = Writer(4)
    one, two, first, second = writer.terms
    program = writer.program(one * first + two / second)
    terms = (Term(0), Term(1), Term(0, statistic=True), Term(1, statistic=True))
    formula = Formula(terms, task_vectors=True, program=program)
    wanted = merged(FusedKernels(), run, formula, torch.float32)
    assert merged(TorchKernels(carrier), run, formula, torch.float32) == wanted


@pytest.mark.parametrize("step", [2, 3, 4])
def test_equal_magnitudes_are_cut_off_in_the_middle_of_a_step(step: int) -> None:
    rng = np.random.default_rng(0)
    base, *models = (elements("coarse", 3 * BLOCK + 9, torch.bfloat16, rng) for _ in range(3))
    run = Operands(BLOCK, base, tuple(models), ())
    bits = int(torch.tensor(0.25).view(torch.int32))
    formula = Formula(
        (Term(0, threshold=bits, cut=(2, 1000)), Term(1, 0.5, threshold=bits, cut=(2, 1 << 20))), True
    )
    wanted = merged(FusedKernels(), run, formula, torch.float32)
    elected = FusedKernels().elected(run, formula)
    for carrier in (InPlace(step * BLOCK), Conveyor(CPU, LateLanes(step), step * BLOCK)):
        kernels = TorchKernels(carrier)
        assert merged(kernels, run, formula, torch.float32) == wanted
        assert kernels.elected(run, formula) == elected


@pytest.mark.parametrize("seed", range(6))
def test_lanes_that_overtake_each_other_where_they_may_change_nothing(seed: int) -> None:
    run = long_run(7, 6, 99, 2, True)
    vectors = Formula((Term(0, 0.5), Term(1, -0.25)), True, Election(1, "count"))
    for formula in (vectors, replace(vectors, terms=(Term(0, threshold=0x3C000000, cut=(3, 5)), Term(1)))):
        wanted = everything(None, run, formula, torch.bfloat16)
        assert everything(Conveyor(CPU, LateLanes(seed), BLOCK), run, formula, torch.bfloat16) == wanted


def test_what_goes_wrong_in_a_chunk_is_waited_for_and_told() -> None:
    joined = []

    class Watched(Lanes):
        def join(self) -> None:
            joined.append(True)

    kernels = TorchKernels(Conveyor(CPU, Watched(), BLOCK))
    run = Operands(0, None, (torch.zeros(9),), ())
    with pytest.raises(ValueError, match="base"):
        kernels.merge(run, Formula((Term(0),), task_vectors=True), torch.empty(9))
    assert joined == [True]


# --- what it takes ----------------------------------------------------------------------------------------


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made within it have at once, as a device's allocator would count them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def grown(call: Callable[[], object]) -> int:
    live = Live()
    with live:
        call()
    return live.most


def test_the_measure_counts_what_is_alive_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = (second * 2)[:10]
        del second
        third.add_(1)

    assert grown(call) == 8000


@pytest.mark.parametrize("models", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [0, 3])
def test_a_pass_takes_no_more_than_it_says(models: int, dtype: torch.dtype, blocks: int) -> None:
    step = 2 * BLOCK
    rng = np.random.default_rng(0)
    numel = blocks * BLOCK + 17
    base, *rest = (elements("ordinary", numel, dtype, rng) for _ in range(models + 1))
    run = Operands(0, base, tuple(rest), tuple(range(models)))
    every = tuple(
        Term(model, 0.3, 1 << 31, 1.7, 0x3C000000, (2, 9) if model else None) for model in range(models)
    )
    formula = Formula(every, True, Election(1, "abs_weights"), 1.3, 0.7)
    out = torch.empty(numel, dtype=dtype)
    kernels = TorchKernels(Conveyor(CPU, Lanes(), step))
    widths = [dtype.itemsize] * (models + 1)
    counts = np.zeros((models, 1 << 16), dtype=np.int64)
    pair = replace(run, base=None, models=(rest[0], rest[-1]))
    calls: dict[str, tuple[Callable[[], object], list[int], int]] = {
        "merge": (lambda: kernels.merge(run, formula, out), widths, dtype.itemsize),
        "nonfinite": (lambda: kernels.nonfinite(run), widths, 0),
        "high": (lambda: kernels.histogram(run, formula, None, counts), widths, 0),
        "low": (lambda: kernels.histogram(run, formula, [0x3C00] * models, counts), widths, 0),
        "equal": (lambda: kernels.equal_counts(run, formula, [0] * models), widths, 0),
        "elected": (lambda: kernels.elected(run, formula), widths, 0),
        "norms": (lambda: kernels.norms(run, formula), widths, 0),
        "products": (lambda: kernels.products(pair, PAIR, PAIRS), widths[:2], 0),
    }
    found = {
        name: (grown(call), device_bytes(numel, inputs, width, step))
        for name, (call, inputs, width) in calls.items()
    }
    assert all(0 < took <= said for took, said in found.values()), found
    assert device_bytes(1 << 40, widths, 2, step) == device_bytes(
        step, widths, 2, step
    )  # however long the run


@pytest.mark.parametrize("models", [1, 3, 16])
def test_every_element_of_a_chunk_takes_no_more_than_it_says(models: int) -> None:
    """What is said in any case, which hides the rest where chunks are small, cancels out between two sizes."""
    rng = np.random.default_rng(0)
    base, *rest = (elements("ordinary", 4 * BLOCK, torch.bfloat16, rng) for _ in range(models + 1))
    every = tuple(Term(model, 0.3, 1 << 31, 1.7, 0x3C000000) for model in range(models))
    formula = Formula(every, True, Election(1, "abs_weights"), 1.3, 0.7)
    counts = np.zeros((models, 1 << 16), dtype=np.int64)
    took: list[list[int]] = []
    said = []
    for blocks in (1, 2):
        numel = 2 * blocks * BLOCK
        run = Operands(0, base[:numel], tuple(model[:numel] for model in rest), tuple(range(models)))
        out = torch.empty(numel, dtype=torch.bfloat16)
        kernels = TorchKernels(Conveyor(CPU, Lanes(), blocks * BLOCK))
        calls: list[Callable[[], object]] = [
            partial(kernels.merge, run, formula, out),
            partial(kernels.histogram, run, formula, None, counts),
            partial(kernels.norms, run, formula),
        ]
        took.append([grown(call) for call in calls[: 1 if models > 3 else 3]])
        said.append(device_bytes(numel, [2] * (models + 1), 2, blocks * BLOCK))
    for one, two in zip(*took, strict=True):
        assert 0 < two - one <= said[1] - said[0]
