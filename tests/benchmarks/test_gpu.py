"""The GPU benchmark runs to its end on the processor, with nothing installed that it does not name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from workers.kernels.conveyor import Lanes
from workers.kernels.moves import Lane

ROOT = Path(__file__).parents[2]
SMALL = ["--elements", "600000", "--step", "262144", "--rounds", "1", "--copy-bytes", "1000000"]
ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not here")

sys.meta_path.insert(0, Nothing())
from benchmarks.gpu import main
code = main(sys.argv[1:])
own = {{name.partition(".")[0] for name in sys.modules}} & {blocked!r}
assert not own, own
sys.exit(code)
"""
BLOCKED = {
    "pydantic", "pydantic_core", "numba", "llvmlite", "ray", "boto3", "botocore", "redis", "fastapi", "httpx",
    "structlog", "typer", "service", "api", "mergemill",
}  # fmt: skip


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", ALONE.format(blocked=BLOCKED), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


def test_it_takes_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    done = alone("--device", "cpu", *SMALL, "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["method"] for each in report["methods"]] == [method.name for method in gpu.METHODS]
    for each in report["methods"]:
        assert each["equal"]
        assert each["elements"] == 600_000 * 5 // 8 + 150_003 + 75_001 + 1023
        assert each["bytes_per_second"] == pytest.approx(each["nbytes"] / each["seconds"])
        assert each["method"] in done.stdout
    assert sorted(report["copies_bytes_per_second"]) == [
        "device_to_device",
        "device_to_host",
        "host_to_device",
    ]
    assert torch.__version__.startswith(report["machine"]["torch"].partition("+")[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to refuse")
def test_without_a_gpu_it_says_so() -> None:
    done = alone()
    assert done.returncode == gpu.NO_GPU == 3
    assert done.stderr.startswith("No GPU: torch ")
    assert not done.stdout


def test_what_differs_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Losing(Lanes):
        """Brings nothing back of the third chunk on."""

        fetched = 0

        def run(self, lane: Lane, work: Callable[[], None], after: Sequence[object] = ()) -> object:
            self.fetched += lane == "fetch"
            return None if lane == "fetch" and self.fetched > 2 else super().run(lane, work, after)

    monkeypatch.setattr(gpu, "Lanes", Losing)
    assert gpu.main(["--device", "cpu", *SMALL]) == 1
    assert "DIFFERENT: 601,027 outputs" in capsys.readouterr().out


def test_methods_are_called_as_ours_are() -> None:
    from workers.methods import METHODS

    measured = {method.name.partition(",")[0] for method in gpu.METHODS}
    assert measured <= set(METHODS)  # the others are made of the same kernels
