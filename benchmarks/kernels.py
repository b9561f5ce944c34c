"""How fast the compiled kernels are, beside a copy of the bytes that they read and beside the torch reference.

``python -m benchmarks.kernels [elements [bfloat16|float16|float32]]``: one thread, a base and three models. Processor
time is taken of each in turn, for several rounds, and the best round is printed: the machine may be busy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from workers.kernels.base import PAIR, PAIRS, Election, Formula, Kernels, Operands, Term
from workers.kernels.cpu import FusedKernels
from workers.kernels.torch_kernels import TorchKernels

ELEMENTS = 11_534_336
"""A projection of a Llama block of 1 B parameters: 2048 by 5632."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDS = 5
REFERENCE_ROUNDS = 1


@dataclass
class Case:
    """One kernel on one set of operands."""

    name: str
    """What is printed."""
    call: Callable[[Kernels], object]
    """Runs it."""
    terms: int
    """Elements that are made per element of a tensor."""
    nbytes: int
    """Bytes of input."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The best time of each: ``fused``, ``torch``, and ``copy`` of as many bytes."""

    def time(self, what: str, call: Callable[[], object]) -> None:
        """Call once, and keep the time if it is the best."""
        start = time.thread_time()
        call()
        self.seconds[what] = min(time.thread_time() - start, self.seconds.get(what, float("inf")))


def inputs(numel: int, dtype: torch.dtype = torch.bfloat16) -> Operands:
    """A base with the spread of a trained layer, and fine-tuned models that differ from it by a hundredth."""
    generator = torch.Generator().manual_seed(3)
    base = 0.02 * torch.randn(numel, generator=generator)
    models = tuple((base + 0.0002 * torch.randn(numel, generator=generator)).to(dtype) for _ in range(3))
    return Operands(0, base.to(dtype), models, (11, 12, 13))


def cases(operands: Operands) -> list[Case]:
    """Every kernel, as the methods use it."""
    out = torch.empty_like(operands.models[0])
    plain = tuple(Term(model, weight=weight) for model, weight in enumerate((0.5, 0.3, 0.2)))
    vectors = Formula(plain, task_vectors=True)
    high, thresholds = _thresholds(operands, vectors)
    trimmed = tuple(replace(term, threshold=bits) for term, bits in zip(plain, thresholds, strict=True))
    dropped = tuple(replace(term, keep_below=1 << 31, factor=2.0) for term in plain)
    without = replace(operands, base=None)
    pair = replace(without, models=operands.models[:2])
    election = Election(1, "abs_weights")
    counts = np.zeros((3, 1 << 16), dtype=np.int64)

    def merge(name: str, formula: Formula, run: Operands) -> Case:
        return _case(name, run, lambda kernels: kernels.merge(run, formula, out))

    return [
        merge("merge: linear", Formula(plain), without),
        merge("merge: slerp", Formula(plain[:2]), pair),
        merge("merge: task arithmetic", vectors, operands),
        merge("merge: ties", Formula(trimmed, True, election), operands),
        merge("merge: dare", Formula(dropped, True), operands),
        merge("merge: dare_ties", Formula(dropped, True, election), operands),
        _case(
            "histogram: high", operands, lambda kernels: kernels.histogram(operands, vectors, None, counts)
        ),
        _case("histogram: low", operands, lambda kernels: kernels.histogram(operands, vectors, high, counts)),
        _case(
            "largest", operands, lambda kernels: kernels.largest(operands, vectors, [operands.numel // 5] * 3)
        ),
        _case("equal_counts", operands, lambda kernels: kernels.equal_counts(operands, vectors, thresholds)),
        _case(
            "elected", operands, lambda kernels: kernels.elected(operands, replace(vectors, terms=trimmed))
        ),
        _case("norms", operands, lambda kernels: kernels.norms(operands, replace(vectors, terms=dropped))),
        _case("products", pair, lambda kernels: kernels.products(pair, PAIR, PAIRS)),
        _case("nonfinite", operands, lambda kernels: kernels.nonfinite(operands)),
    ]


def _case(name: str, operands: Operands, call: Callable[[Kernels], object]) -> Case:
    nbytes = sum(tensor.nbytes for tensor in operands.inputs)
    return Case(name, call, len(operands.models), nbytes)


def _thresholds(operands: Operands, formula: Formula) -> tuple[list[int], list[int]]:
    """Of each model's task vector: the high bits of the magnitude that a fifth reaches, and all of them."""
    bits = [
        int(((model.float() - operands.base.float()).view(torch.int32) & 0x7FFFFFFF).kthvalue(
            operands.numel * 4 // 5
        ).values)
        for model in operands.models
        if operands.base is not None
    ]  # fmt: skip
    return [value >> 16 for value in bits], bits


def main(numel: int, name: str) -> None:
    """Time all of them and print a table."""
    torch.set_num_threads(1)
    fused, reference = FusedKernels(), TorchKernels()
    operands = inputs(numel, DTYPES[name])
    found = cases(operands)
    source = torch.empty(max(case.nbytes for case in found), dtype=torch.uint8).random_()
    target = torch.zeros_like(source)
    for number in range(ROUNDS + 1):  # the first one warms up: its times are dropped
        for case in found:
            if number == 1:
                case.seconds.clear()
            case.time("copy", partial(target[: case.nbytes].copy_, source[: case.nbytes]))
            case.time("fused", partial(case.call, fused))
            if number <= REFERENCE_ROUNDS:
                case.time("torch", partial(case.call, reference))
    lines = [f"{numel:,} elements, {name}, one thread, best of {ROUNDS}; copy: of the bytes read"]
    lines.append(
        f"{'kernel':<24}{'ms':>8}{'ns/element':>12}{'Gelem/s':>9}{'GB/s':>8}{'÷ copy':>8}{'torch ÷':>9}"
    )
    for case in found:
        took = case.seconds["fused"]
        each = took / numel / case.terms
        lines.append(
            f"{case.name:<24}{took * 1e3:>8.1f}{each * 1e9:>12.2f}{1e-9 / each:>9.2f}{case.nbytes / took / 1e9:>8.1f}"
            f"{took / case.seconds['copy']:>8.1f}{case.seconds['torch'] / took:>9.1f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    wanted = sys.argv[2] if len(sys.argv) > 2 else "bfloat16"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ELEMENTS, wanted)
