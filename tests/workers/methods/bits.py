"""Prints a digest of every case's merged bits, under one and two threads. Run as a module, by ``test_bits``."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from tests.workers.methods.cases import CASES, WIDE, statistics, tensors
from workers.methods.evaluate import merge_tensor


def digests(threads: int) -> dict[str, str]:
    """Hex digest of the float32 bits that each case merges to."""
    torch.set_num_threads(threads)
    found = {}
    for name, of in CASES.items():
        base, models = tensors(of, WIDE)
        known = statistics(of, models[0].shape)
        merged = merge_tensor(
            of.method, of.parameters, of.models, base, models, mask_keys=of.keys, statistics=known
        )
        found[name] = hashlib.sha256(merged.numpy().tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(
            {"capability": torch.backends.cpu.get_cpu_capability(), "one": digests(1), "two": digests(2)}
        )
    )
