"""Methods from outside the tree: a distribution's entry point is enough, in every process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workers.methods import METHODS
from workers.methods.found import GROUP, found_outside

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/add-a-method.md"

MERGE = """
import torch
from pathlib import Path
from service.planning.plan import PlanOptions
from tests.checkpoints import read_checkpoint
from tests.workers.execute import plan, run, write_models

root = Path({root!r})
models = dict(base=[0, 1, 1], a=[3, 0, 1], b=[-2, 4, 1])
write_models(root, {{name: {{"w": torch.tensor(values, dtype=torch.float32)}} for name, values in models.items()}})
done = run(plan(root, "closest", ["a", "b"], {{}}, PlanOptions()), root / "out")
raw = done.shards()[0][-12:]
print(torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist())
"""
"""A merge from recipe to shards, in a process of its own, as a worker is one."""


def install(site: Path, points: dict[str, str], **modules: str) -> Path:
    """What ``pip install`` leaves of a distribution with these entry points."""
    about = site / "toy-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    return site


def example() -> str:
    """The method that the page shows."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return re.sub(r"^   ", "", text, flags=re.MULTILINE).lstrip()


def test_the_pages_method_merges_from_outside_the_tree(tmp_path: Path) -> None:
    site = install(tmp_path / "site", {"closest": "toy_methods:CLOSEST"}, toy_methods=example())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-c", MERGE.format(root=str(tmp_path))],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert ran.stdout.strip() == "[-2.0, 0.0, 1.0]"


def test_what_cannot_be_a_method_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "from workers.methods.linear import LINEAR\nTIES = LINEAR\nNOTHING = 3\n"
    points = {
        "linear": "toy_broken:LINEAR", "other": "toy_broken:TIES", "three": "toy_broken:NOTHING",
        "gone": "toy_gone:METHOD",
    }  # fmt: skip
    monkeypatch.syspath_prepend(install(tmp_path, points, toy_broken=broken))
    assert found_outside(METHODS) == {}
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "toy_broken:LINEAR is left out: there is a 'linear' already" in said
    assert "toy_broken:TIES is left out: it is no Method called 'other'" in said
    assert "toy_broken:NOTHING is left out" in said
    assert "toy_gone:METHOD cannot be loaded" in said
