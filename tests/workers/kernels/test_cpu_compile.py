"""Compiled code is kept, and computes even where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from numba.core import caching

from workers.kernels import cpu_compile
from workers.kernels.base import Formula, Operands, Term
from workers.kernels.cpu import FusedKernels
from workers.kernels.cpu_compile import Floats, Kernel, inlined
from workers.kernels.torch_kernels import TorchKernels

ROOT = Path(__file__).parents[3]


def double(x: Floats) -> None:
    for i in range(x.size):
        x[i] += x[i]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(double, "__qualname__", "double")
    return tmp_path


def doubles(kernel: Kernel) -> bool:
    x = np.arange(5, dtype=np.float32)
    kernel(x)
    return x.tolist() == [0, 2, 4, 6, 8]


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.nb*")}


def test_code_is_kept_under_the_digest_of_its_sources(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert doubles(Kernel(double))
    names = kept(cache)
    assert len(names) == 2
    assert all(cpu_compile._DIGEST in name for name in names)
    assert doubles(Kernel(double))
    assert kept(cache) == names
    assert not caplog.records


def test_other_sources_never_meet_kept_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doubles(Kernel(double))
    before = kept(cache)
    monkeypatch.setattr(cpu_compile, "_DIGEST", "0" * 16)
    assert doubles(Kernel(double))
    assert len(kept(cache)) == 4
    assert before.items() <= kept(cache).items()


def test_without_a_directory_that_can_be_written_code_is_compiled_and_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert doubles(Kernel(double))
    assert not kept(cache)
    assert "not kept" in caplog.text


def test_a_full_disk_does_not_fail_the_work(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, name: str, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    assert doubles(Kernel(double))
    assert "No space left" in caplog.text


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damaged_code_is_compiled_anew(cache: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    assert doubles(Kernel(double))
    (path,) = cache.rglob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:20])
    assert doubles(Kernel(double))
    assert "not kept" in caplog.text


def test_threads_that_come_first_wait_for_one_compilation(cache: Path) -> None:
    compiled: list[tuple[object, ...]] = []

    class Counting(Kernel):
        def _compile(self, arguments: tuple[object, ...]) -> Callable[..., None]:
            compiled.append(arguments)
            return super()._compile(arguments)

    kernel = Counting(double)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: doubles(kernel), range(8)))
    assert len(compiled) == 1
    assert len(kept(cache)) == 2


def test_arguments_of_other_types_are_refused(cache: Path) -> None:
    kernel = Kernel(double)
    assert doubles(kernel)
    with pytest.raises(TypeError):
        kernel(np.zeros(3))


def test_no_two_compiled_functions_have_one_name() -> None:
    # Else one kernel's loop over bfloat16 is taken for another's over float16, both of them uint16.
    def loop(x: Floats) -> None:
        x[0] = 1

    assert inlined(loop, "one_loop") is not inlined(loop, "another")
    with pytest.raises(ValueError, match="one_loop"):
        inlined(loop, "one_loop")


def agree(name: str) -> bool:
    """Whether a compiled statistic is torch's, of a bfloat16 and a float16 model."""
    models = tuple((torch.arange(99) - 50).to(dtype) / 64 for dtype in (torch.bfloat16, torch.float16))
    run, formula = Operands(0, None, models, ()), Formula((Term(0), Term(1)))
    found: list[object] = []
    for kernels in (FusedKernels(), TorchKernels()):
        if name == "elected":
            found.append(kernels.elected(run, formula))
        else:
            found.append(kernels.equal_counts(run, formula, [0x3F000000] * 2).tolist())
    return found[0] == found[1]


def test_kernels_that_separate_processes_compiled_work_together(tmp_path: Path) -> None:
    program = (
        "import sys, numba; numba.config.CACHE_DIR = sys.argv[1]\n"
        "from tests.workers.kernels.test_cpu_compile import agree\n"
        "sys.exit(not all([agree(name) for name in sys.argv[2:]]))"
    )

    def run(*names: str) -> int:
        command = [sys.executable, "-W", "error", "-c", program, str(tmp_path), *names]
        return subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode

    assert run("elected") == 0
    assert run("equal_counts") == 0
    before = kept(tmp_path)
    assert len(before) == 4
    assert run("elected", "equal_counts") == 0
    assert kept(tmp_path) == before


def test_processes_may_compile_at_once(cache: Path) -> None:
    program = (
        "import sys, numba; numba.config.CACHE_DIR = sys.argv[1]\n"
        "from tests.workers.kernels.test_cpu_compile import Kernel, double, doubles\n"
        "sys.exit(not doubles(Kernel(double)))"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(cache)]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
    assert len(kept(cache)) == 2
    assert doubles(Kernel(double))
