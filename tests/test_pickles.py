"""Nothing of ours ever unpickles: a pickle is a program, and checkpoints come from strangers.

Ray pickles what its own processes send each other, under its token; what we hand it is JSON. numba keeps compiled
kernels in a cache of the user's own. Neither ever reads a byte of a checkpoint that way, which the tests below show.
"""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from service.planning.opening import open_checkpoint
from tests.checkpoints import write_checkpoint
from workers.errors import PlanError
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"torch.load", "torch.jit.load", "torch.package", "numpy.load", "np.load", "pandas.read_pickle"}


@pytest.mark.parametrize("package", ["api", "service", "workers", "mergemill"])
def test_nothing_imports_what_unpickles(package: str) -> None:
    found = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name != "pickle"]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            wrong = [name for name in names if name.partition(".")[0] in MODULES or name in CALLS]
            found += [
                f"{path}: {name}" for name in wrong if not name.endswith("Error")
            ]  # numba's cache raises them
    assert found == []


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "last.ckpt", "model.pkl",
     "model.pickle", "weights.npz", "model.h5", "flax_model.msgpack"],
)  # fmt: skip
def test_pickles_are_refused_by_name_and_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    (tmp_path / name).chmod(0)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for where, what in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (np, "load"),
    ):
        monkeypatch.setattr(where, what, refuse)
    with pytest.raises(PlanError, match=r"only safetensors is read \(pickles never are\); convert it first"):
        open_checkpoint(LocalStore(), f"file://{tmp_path}")


def test_a_pickle_under_the_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(buffer.getvalue())
    with pytest.raises(PlanError, match="not a safetensors file"):
        open_checkpoint(LocalStore(), f"file://{tmp_path}")
