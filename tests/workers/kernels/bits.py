"""Prints digests of what both kernels compute. Run as a module, by ``test_cpu``."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch

from tests.workers.kernels.formulas import DTYPES, elements, merged, statistics
from workers.kernels.base import Election, Formula, Kernels, Operands, Term
from workers.kernels.cpu import FusedKernels
from workers.kernels.torch_kernels import TorchKernels

NUMEL = 70_001
"""More than a core's share under torch's grain, off every vector's width."""


def digests(kernels: Kernels) -> list[str]:
    """Of merges and statistics of 3 and of 9 models of all dtypes."""
    found = []
    for models in (3, 9):
        rng = np.random.default_rng(models)
        base, *rest = (elements("ordinary", NUMEL, DTYPES[k % 3], rng) for k in range(models + 1))
        run = Operands(0, base, tuple(rest), tuple(range(models)))
        terms = tuple(
            Term(model, 0.1 + 0.3 * model, (1 << 32, 3 << 30)[model % 2], 1.7, 0x3C000000)
            for model in range(models)
        )
        for formula in (
            Formula(terms, True, Election(1, "abs_weights"), lambda_=0.7),
            Formula(terms, divide=1.3),
        ):
            for dtype in DTYPES:
                found.append(str(merged(kernels, run, formula, dtype)))
            if models == 3:
                found.append(str(statistics(kernels, run, formula)))
    return [hashlib.sha256(text.encode()).hexdigest() for text in found]


if __name__ == "__main__":
    result: dict[str, object] = {"capability": torch.backends.cpu.get_cpu_capability()}
    result["fused"] = digests(FusedKernels())
    for name, threads in (("one", 1), ("two", 2)):
        torch.set_num_threads(threads)
        result[name] = digests(TorchKernels())
    sys.stdout.write(json.dumps(result))
