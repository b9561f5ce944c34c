"""The benchmark's inputs: the shapes that they claim, the same bytes every time, made once."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.inputs import INDEX, SIZES, STAMP, TUNE_SIGMA, Inputs, Size, make_inputs
from tests.checkpoints import llama_tensors, nbytes

pytestmark = pytest.mark.fast

SMALL = Size("small", 64, 2, 4, 2, 176, 256, shard_bytes=60_000, tunes=2)


def test_sizes_are_what_they_are_called() -> None:
    parameters = {name: size.parameters for name, size in SIZES.items()}
    assert parameters == {"tiny": 4_000_000, "100m": 134_105_856, "1b": 852_559_872, "7b": 6_738_415_616}
    assert SIZES["7b"].models == ("base", "tune-1", "tune-2")


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(size: Size) -> None:
    shapes, shards = size.shapes(), size.shards()
    assert [name for shard in shards for name in shard] == list(shapes)
    for shard in shards:
        assert sum(2 * prod(shapes[name]) for name in shard) <= size.shard_bytes or len(shard) == 1


def test_names_and_shapes_are_those_of_a_llama() -> None:
    llama = llama_tensors(layers=2, hidden=64, heads=4, vocab=256, key_value_heads=2, intermediate=176)
    assert SMALL.shapes() == {name: tuple(tensor.shape) for name, tensor in llama.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Small inputs."""
    return make_inputs(SMALL, tmp_path_factory.mktemp("inputs"))


def _load(inputs: Inputs, model: str) -> dict[str, torch.Tensor]:
    return {name: tensor for path in inputs.files(model) for name, tensor in load_file(path).items()}


def test_models_are_whole_bfloat16_and_close_to_their_base(made: Inputs) -> None:
    base = _load(made, "base")
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == SMALL.shapes()
    assert nbytes(base) == 2 * SMALL.parameters
    index = json.loads((made.directory("tune-1") / INDEX).read_text())
    assert {path.name for path in made.files("tune-1")} == set(index["weight_map"].values())
    steps = []
    for model in ("tune-1", "tune-2"):
        tuned = _load(made, model)
        assert all(tensor.dtype == torch.bfloat16 for tensor in tuned.values())
        steps.append(tuned["lm_head.weight"].double() - base["lm_head.weight"].double())
        assert steps[-1].std() == pytest.approx(TUNE_SIGMA, rel=0.05)
    assert float((steps[0] * steps[1]).mean()) == pytest.approx(0, abs=TUNE_SIGMA**2 / 20)  # each its own


def test_inputs_are_made_once_and_the_same_again(made: Inputs, tmp_path: Path) -> None:
    shard = made.files("tune-2")[0]
    before = shard.stat().st_mtime_ns
    assert make_inputs(SMALL, made.root.parent).files("tune-2")[0].stat().st_mtime_ns == before
    again = make_inputs(SMALL, tmp_path)
    for model in SMALL.models:
        assert [path.read_bytes() for path in again.files(model)] == [
            path.read_bytes() for path in made.files(model)
        ]


def test_inputs_of_another_shape_or_half_made_are_made_anew(tmp_path: Path) -> None:
    make_inputs(SMALL, tmp_path)
    wide = replace(SMALL, vocab=320)
    inputs = make_inputs(wide, tmp_path)
    assert _load(inputs, "tune-1")["lm_head.weight"].shape == (320, 64)
    whole = [path.read_bytes() for path in inputs.files("base")]
    (inputs.root / STAMP).unlink()  # as after an interruption
    inputs.files("base")[0].unlink()
    assert [path.read_bytes() for path in make_inputs(wide, tmp_path).files("base")] == whole


def test_linked_fine_tunes_share_the_shards_that_are_not_their_own(tmp_path: Path) -> None:
    inputs = make_inputs(replace(SMALL, linked=True), tmp_path)
    inodes = {model: [path.stat().st_ino for path in inputs.files(model)] for model in SMALL.models}
    for number, base in enumerate(inodes["base"]):
        own = [model for model in ("tune-1", "tune-2") if inodes[model][number] != base]
        assert own == [("tune-1", "tune-2")[number % 2]]
    inputs.warm(SMALL.models)  # which here means: drop them from the cache; the bytes are still there
    assert _load(inputs, "tune-1").keys() == SMALL.shapes().keys()
