"""Whether a GPU gives the processor's bits, and how fast it merges beside its copies: ``python -m benchmarks.gpu``.

Needs nothing but torch, numpy and safetensors, so that it runs wherever there is a GPU. It writes four small
checkpoints to a temporary directory, merges them by every method with the torch reference on the processor and on
the GPU as a worker would (pinned memory, chunks, streams), compares all bits of the surveys and of the outputs, and
prints bytes a second beside the measured rates of plain copies. Exit codes: 0 all equal, 1 something differs, 3 no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.gpu_methods import METHODS, Method
from workers.arena import Arena, padded
from workers.kernels import pin_of
from workers.kernels.base import Kernels, Operands
from workers.kernels.conveyor import Conveyor, Lanes
from workers.kernels.gpu import CudaLanes
from workers.kernels.moves import CHUNK_ELEMENTS
from workers.kernels.torch_kernels import TorchKernels
from workers.random import mask_key

NO_GPU = 3
"""Exit code where there is no GPU."""

ELEMENTS = 1 << 26
COPY_BYTES = 256 << 20
MODELS = ("base", "one", "two", "three")


# --- what is merged ------------------------------------------------------------------------------------------


def write_checkpoints(directory: Path, elements: int) -> None:
    """A base and three fine-tunes of it: four tensors, of every dtype, of dtypes mixed, and off the grid."""
    generator = torch.Generator().manual_seed(0)
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    tensors = {
        "embedding": (elements * 5 // 8, (bfloat16,) * 4),
        "float32": (elements // 4 + 3, (float32,) * 4),
        "float16": (elements // 8 + 1, (float16,) * 4),
        "norm": (1023, (float32, bfloat16, float16, bfloat16)),
    }
    models: dict[str, dict[str, torch.Tensor]] = {model: {} for model in MODELS}
    for name, (numel, dtypes) in tensors.items():
        base = 0.02 * torch.randn(numel, generator=generator)
        for model, dtype in zip(MODELS, dtypes, strict=True):
            change = 0.001 * torch.randn(numel, generator=generator) if model != "base" else 0.0
            models[model][name] = (base + change).to(dtype)
    for model, named in models.items():
        save_file(named, directory / f"{model}.safetensors")


@dataclass(frozen=True)
class Case:
    """One tensor of all checkpoints, in memory that a device copies from, and room for what is made of it."""

    operands: Operands
    """The base and the models."""
    out: torch.Tensor
    """The output, in the first model's dtype."""
    arena: Arena
    """Where all of it lies; its memory is pinned for as long as it is there."""

    def of(self, method: Method) -> Operands:
        """What a method takes of it."""
        run = self.operands
        return replace(run, base=run.base if method.base else None, models=run.models[: method.models])


def read_cases(directory: Path, device: str) -> list[Case]:
    """Every tensor, read into one arena, pinned where the device copies from it."""
    named: dict[str, list[torch.Tensor]] = {}
    for model in MODELS:
        with safe_open(directory / f"{model}.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                named.setdefault(name, []).append(file.get_tensor(name))
    sizes = [tensor.nbytes for tensors in named.values() for tensor in (*tensors, tensors[1])]
    arena = Arena(sum(map(padded, sizes)), pin_of(device))
    room = iter(arena.take(sizes))
    cases = []
    for name, tensors in named.items():
        placed = [torch.frombuffer(next(room).view, dtype=x.dtype) for x in (*tensors, tensors[1])]
        for there, tensor in zip(placed, tensors, strict=False):
            there.copy_(tensor)
        keys = tuple(mask_key(0, model, name) for model in range(len(tensors) - 1))
        cases.append(Case(Operands(0, placed[0], tuple(placed[1:-1]), keys), placed[-1], arena))
    return cases


# --- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One method on the device."""

    method: str
    """Its name."""
    elements: int
    """Elements of all outputs."""
    differing: int
    """Of these, elements whose bits are not the reference's."""
    survey_numbers: int
    """Numbers that the surveys found: thresholds, counts and block sums."""
    surveys_equal: bool
    """Whether they are the reference's, bit for bit."""
    passes: int
    """How often each input byte goes to the device."""
    nbytes: int
    """Bytes of inputs and outputs, each counted once."""
    seconds: float
    """Best time of the rounds, from main memory to main memory."""
    reference_seconds: float
    """Time of the torch reference on the processor, once."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.surveys_equal and not self.differing

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


def merge_all(kernels: Kernels, method: Method, cases: Sequence[Case]) -> tuple[float, list[list[float]]]:
    """Seconds that a method took over all tensors, and what its surveys found."""
    start = time.perf_counter()
    found = []
    for case in cases:
        operands = case.of(method)
        formula, numbers = method.survey(kernels, operands)
        kernels.merge(operands, formula, case.out)
        found.append(numbers)
    return time.perf_counter() - start, found


def measure(method: Method, cases: Sequence[Case], kernels: Kernels, rounds: int) -> Result:
    """Merge by the reference, then on the device, and compare."""
    reference_seconds, wanted = merge_all(TorchKernels(), method, cases)
    outputs = [_bits(case.out).clone() for case in cases]
    seconds, differing, same = math.inf, 0, True
    for number in range(rounds + 1):  # the first one warms up
        for case in cases:
            case.out.fill_(math.nan)
        took, found = merge_all(kernels, method, cases)
        seconds = min(seconds, took) if number else math.inf
        differences = (
            int(torch.count_nonzero(_bits(case.out) != out)) for case, out in zip(cases, outputs, strict=True)
        )
        differing = max(differing, sum(differences))
        same &= [list(map(float.hex, map(float, row))) for row in found] == [
            list(map(float.hex, map(float, row))) for row in wanted
        ]
    nbytes = sum(x.nbytes for case in cases for x in (*case.of(method).inputs, case.out))
    elements = sum(case.out.numel() for case in cases)
    return Result(
        method.name, elements, differing, sum(map(len, wanted)), same,
        method.passes, nbytes, seconds, reference_seconds,
    )  # fmt: skip


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def copy_rates(device: torch.device, nbytes: int, rounds: int) -> dict[str, float]:
    """Bytes a second of plain copies between pinned main memory and the device, and within the device."""
    arena = Arena(nbytes, pin_of(device.type))
    (extent,) = arena.take([nbytes])
    host = torch.frombuffer(extent.view, dtype=torch.uint8).fill_(1)
    there, other = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    copies = {
        "host_to_device": (there, host),
        "device_to_host": (host, there),
        "device_to_device": (other, there),
    }
    found = {}
    for name, (to, source) in copies.items():
        best = math.inf
        for number in range(rounds + 1):
            _wait(device)
            start = time.perf_counter()
            to.copy_(source, non_blocking=True)
            _wait(device)
            best = min(best, time.perf_counter() - start) if number else math.inf
        found[name] = nbytes / best
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {
            "device": torch.cuda.get_device_name(device),
            "compute_capability": f"{major}.{minor}",
            "cuda": str(torch.version.cuda),
            "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    tools = {tool: version(tool) for tool in ("torch", "numpy", "safetensors")}
    return {**found, "python": platform.python_version(), **tools}


# --- the command ---------------------------------------------------------------------------------------------


def table(where: dict[str, Any], copies: dict[str, float], results: Sequence[Result]) -> str:
    """Everything, for people."""
    lines = [", ".join(f"{name} {value}" for name, value in where.items())]
    lines += [f"copy {name.replace('_', ' '):<18}{rate / 1e9:>9.2f} GB/s" for name, rate in copies.items()]
    up = copies["host_to_device"]
    lines.append(
        f"{'method':<20}{'GB/s':>8}{'÷ copy':>8}{'sent':>6}{'ms':>9}{'÷ reference':>13}  compared bit for bit"
    )
    for result in results:
        compared = f"{result.elements:,} outputs"
        if result.survey_numbers:
            compared += f", {result.survey_numbers:,} numbers of its surveys"
        verdict = "equal" if result.equal else f"DIFFERENT: {result.differing:,} outputs"
        if not result.surveys_equal:
            verdict += ", surveys"
        lines.append(
            f"{result.method:<20}{result.rate / 1e9:>8.2f}{result.rate / up:>8.2f}{result.passes:>6}"
            f"{result.seconds * 1e3:>9.1f}{result.reference_seconds / result.seconds:>13.1f}  {compared}: {verdict}"
        )
    lines.append(
        "GB/s: inputs and output once each, from main memory to main memory; ÷ copy: host to device."
    )
    lines.append(
        "sent: how often each input byte goes to the device; ÷ reference: times as fast as torch here."
    )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device", default="cuda", help="cuda (default), cuda:1, or cpu: the same path without a GPU"
    )
    parser.add_argument(
        "--elements", type=int, default=ELEMENTS, help=f"of a checkpoint, about ({ELEMENTS:,})"
    )
    parser.add_argument(
        "--step", type=int, default=CHUNK_ELEMENTS, help=f"elements of a chunk ({CHUNK_ELEMENTS:,})"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the best counts (5)")
    parser.add_argument(
        "--copy-bytes", type=int, default=COPY_BYTES, help=f"of a plain copy ({COPY_BYTES:,})"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file, too")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"No GPU: torch {torch.__version__} finds no CUDA device here, so nothing was measured. "
            "--device cpu runs the same path on the processor.\n"
        )
        return NO_GPU
    lanes = CudaLanes(device) if device.type == "cuda" else Lanes()
    kernels = TorchKernels(Conveyor(device, lanes, asked.step))
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoints(Path(directory), asked.elements)
        cases = read_cases(Path(directory), asked.device)
    where, copies = machine(device), copy_rates(device, asked.copy_bytes, asked.rounds)
    results = [measure(method, cases, kernels, asked.rounds) for method in METHODS]
    sys.stdout.write(table(where, copies, results))
    if asked.json is not None:
        methods = [
            asdict(result) | {"equal": result.equal, "bytes_per_second": result.rate} for result in results
        ]
        report = {"machine": where, "step": asked.step, "copies_bytes_per_second": copies, "methods": methods}
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
