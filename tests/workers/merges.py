"""Merges of small models by every method, what float64 makes of the same models, and the digests of the outputs."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from service.planning.plan import PlanOptions
from tests.checkpoints import Tensors
from tests.workers.execute import MIB, Done, dyadic, plan, run
from workers.random import keep_mask, mask_key
from workers.safetensors_format import parse
from workers.task import BLOCK_BYTES, block_count

Vector = npt.NDArray[np.float64]
SPLIT = PlanOptions(part_bytes=5 * MIB, whole_tensor_bytes=5 * MIB, worker_memory_bytes=1 << 40)
"""Options that cut a big tensor."""
WHOLE = PlanOptions(worker_memory_bytes=1 << 40)
"""Options that leave it whole."""
WEIGHTS = (0.5, -0.25, 2.0)
NAMES = ["a", "b", "c"]


def opened(done: Done) -> Tensors:
    """The merged tensors as the safetensors library reads them."""
    found: Tensors = {}
    for shard in done.planned.plan.shards:
        with safe_open(done.output / shard.name, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def models(*shape: int) -> dict[str, Tensors]:
    """A base and three models, of one tensor ``w`` of this shape each, whose float32 sums are exact."""
    return {name: {"w": dyadic(seed, *shape)} for seed, name in enumerate(["base", *NAMES])}


# --- the same once more, in float64 ------------------------------------------------------------------------


def trimmed(tau: Vector, density: float) -> Vector:
    k = max(1, math.floor(density * tau.size + 1e-9))
    threshold = np.sort(np.abs(tau))[-k]
    return np.where(np.abs(tau) >= threshold, tau, 0)


def consensus(taus: list[Vector], normalize: bool) -> Vector:
    weighted = [weight * tau for weight, tau in zip(WEIGHTS, taus, strict=True)]
    signs = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(each) == signs for each in weighted]
    total = sum(np.where(yes, each, 0) for yes, each in zip(agree, weighted, strict=True))
    below = sum(np.where(yes, abs(weight), 0) for yes, weight in zip(agree, WEIGHTS, strict=True))
    return np.asarray(total / np.where(below == 0, 1, below) if normalize else total)


def dropped(tau: Vector, model: int, density: float, match_norm: bool) -> Vector:
    keep = keep_mask(mask_key(7, model, "w"), 0, tau.size, density).numpy()
    kept = np.where(keep, tau, 0)
    return np.asarray(kept * (np.abs(tau).sum() / np.abs(kept).sum() if match_norm else 1 / density))


def slerp(t: float, one: Vector, two: Vector) -> Vector:
    angle = math.acos(float(one @ two) / math.sqrt(float(one @ one)) / math.sqrt(float(two @ two)))
    return np.asarray((math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle))


def expected(case: str, flat: dict[str, Vector]) -> Vector:  # noqa: PLR0911 - a method a line
    """What a case makes of the flat values of the models, a tensor ``w`` each."""
    base, (a, b, c) = flat["base"], (flat[name] for name in NAMES)
    taus = [model - base for model in (a, b, c)]
    mean = sum(weight * model for weight, model in zip(WEIGHTS, (a, b, c), strict=True))
    if case == "linear":
        return np.asarray(mean / sum(WEIGHTS))
    if case == "slerp":
        return slerp(0.25, a, b)
    if case == "passthrough":
        return a
    if case == "task_arithmetic":
        return base + 0.5 * sum(weight * tau for weight, tau in zip(WEIGHTS, taus, strict=True))
    if case == "ties":
        return base + 0.5 * consensus([trimmed(tau, 0.3) for tau in taus], normalize=True)
    drops = [dropped(tau, index, 0.25, match_norm=case == "dare_l1") for index, tau in enumerate(taus)]
    if case == "dare_ties":
        return base + 0.5 * consensus(drops, normalize=False)
    return base + 0.5 * sum(weight * each for weight, each in zip(WEIGHTS, drops, strict=True))


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "linear": ("linear", 3, {}),
    "slerp": ("slerp", 2, {"t": 0.25}),
    "passthrough": ("passthrough", 1, {}),
    "task_arithmetic": ("task_arithmetic", 3, {"lambda": 0.5}),
    "ties": ("ties", 3, {"lambda": 0.5, "density": 0.3}),
    "dare_ties": ("dare_ties", 3, {"lambda": 0.5, "density": 0.25}),
    "dare_linear": ("dare_linear", 3, {"lambda": 0.5, "density": 0.25}),
    "dare_l1": ("dare_linear", 3, {"lambda": 0.5, "density": 0.25, "rescale": "l1"}),
}
"""Method, number of models and parameters of each case."""


def merge(root: Path, case: str, options: PlanOptions, output: str, order: int = 0, **more: Any) -> Done:
    """Run a case on the models below ``root``, the tasks in an order shuffled by ``order``."""
    method, count, parameters = CASES[case]
    weighted = method not in ("slerp", "passthrough")
    listed = [
        {"model": str(root / name), "parameters": {"weight": weight} if weighted else {}}
        for name, weight in zip(NAMES[:count], WEIGHTS, strict=False)
    ]
    planned = plan(root, method, [], parameters, options, models=listed, seed=7, **more)
    return run(planned, root / output, order=order)


def assert_digests(done: Done) -> None:
    """Every digest is the SHA-256 of 1 MiB of the file, found through the safetensors header alone."""
    blocks: dict[str, dict[int, str]] = {}
    for result in done.results:
        for digest in result.digests:
            own = blocks.setdefault(digest.name, {})
            for number, block in enumerate(digest.blocks, start=digest.first_block):
                assert number not in own
                own[number] = block
    for data in done.shards():
        (length,) = struct.unpack("<Q", data[:8])
        for entry in parse(data[8 : 8 + length], len(data)).entries:
            tensor = data[8 + length + entry.start : 8 + length + entry.end]
            own = blocks.get(entry.name, {})
            assert sorted(own) == list(range(block_count(len(tensor))))
            for number, block in own.items():
                expected = tensor[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                assert block == hashlib.sha256(expected).hexdigest()
