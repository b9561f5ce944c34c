"""config.json after slicing: the depth wherever it is said, what there is one of for each layer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from service.planning.depth import with_depths
from service.planning.pairing import Slicing
from tests.service.headers import checkpoint

pytestmark = pytest.mark.fast


def sliced(
    config: dict[str, Any], origins: list[int], depth: int, stack: str = "model.layers.", **others: Any
) -> tuple[dict[str, Any], list[str]]:
    """The config of a model of ``depth`` layers once it has those of ``origins``; negative ones are another's."""
    own, other = (
        checkpoint("file:///a", {}, config=config),
        checkpoint("file:///b", {}, config=others or config),
    )
    taken = tuple((own, layer) if layer >= 0 else (other, ~layer) for layer in origins)
    found, notices = with_depths(config, [Slicing(stack, depth, taken)])
    assert found is not None
    return found, notices


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_depth_is_corrected_whatever_it_is_called(key: str) -> None:
    found, notices = sliced({key: 4, "hidden_size": 4, "vocab_size": 32}, [0, 1, 1, 2, 3, 3], 4)
    assert found == {key: 6, "hidden_size": 4, "vocab_size": 32}
    assert notices == [f"config.json: {key} 4 → 6"]


def test_what_there_is_one_of_for_each_layer_follows_the_layers_and_the_models() -> None:
    kinds = ["full", "sliding", "full", "sliding"]
    config = {
        "num_hidden_layers": 4, "layer_types": kinds, "no_rope_layers": [1, 1, 1, 0], "eos_token_id": [1, 2, 3, 4],
        "architectures": ["A", "B", "C", "D"], "rope_scaling": {"short_factor": [1, 2, 3, 4]},
    }  # fmt: skip
    found, _ = sliced(config, [0, 3, ~2, 3], 4, num_hidden_layers=4, layer_types=["x", "x", "their own", "x"])
    assert found == config | {
        "layer_types": ["full", "sliding", "their own", "sliding"], "no_rope_layers": [1, 0, 1, 0],
    }  # fmt: skip


def test_numbers_of_layers_and_counts_of_the_first_follow_them() -> None:
    config = {
        "num_hidden_layers": 6,
        "max_window_layers": 6,
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0, 4],
    }
    found, _ = sliced(config, [0, 0, 1, 4, 5, 4, 2, 3], 6)
    assert found == {
        "num_hidden_layers": 8, "max_window_layers": 8, "first_k_dense_replace": 2, "mlp_only_layers": [0, 1, 3, 5],
    }  # fmt: skip


def test_all_layers_in_their_places_change_nothing() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "max_window_layers": 9}
    assert sliced(config, [0, 1, 2], 3) == (config, [])
    assert sliced({"no": "depth"}, [0, 1, 2], 3) == ({"no": "depth"}, [])


def test_towers_are_told_apart_even_when_they_are_as_deep() -> None:
    config = {
        "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]},
        "vision_config": {"num_hidden_layers": 4, "depth": 4},
    }  # fmt: skip
    found, _ = sliced(config, [3, 0], 4, "language_model.model.layers.")
    assert found == config | {"text_config": {"num_hidden_layers": 2, "layer_types": ["d", "a"]}}
    found, _ = sliced(config, [3, 0], 4, "vision_tower.encoder.layers.")
    assert found == config | {"vision_config": {"num_hidden_layers": 2, "depth": 2}}
    alone, _ = sliced({"num_hidden_layers": 4}, [0], 4, "vit.encoder.layer.")
    assert alone == {"num_hidden_layers": 1}


def test_encoders_and_decoders_are_told_apart() -> None:
    t5 = {"is_encoder_decoder": True, "num_layers": 4, "num_decoder_layers": 4}
    assert sliced(t5, [0, 1], 4, "encoder.block.")[0] == t5 | {"num_layers": 2}
    assert sliced(t5, [0, 1], 4, "decoder.block.")[0] == t5 | {"num_decoder_layers": 2}
    short = {"is_encoder_decoder": True, "num_layers": 4}
    assert sliced(short, [0, 1], 4, "decoder.block.")[0] == short | {"num_decoder_layers": 2}
    bart = {"is_encoder_decoder": True, "encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
    assert sliced(bart, [0], 4, "model.decoder.layers.")[0] == bart | {"decoder_layers": 1}
    changed = {"encoder_layers": 1, "num_hidden_layers": 1}
    assert sliced(bart, [0], 4, "model.encoder.layers.")[0] == bart | changed


def test_what_cannot_be_corrected_is_told() -> None:
    found, (notice,) = sliced({"hidden_size": 4}, [0], 4)
    assert found == {"hidden_size": 4}
    assert "nothing in it says that `model.layers.` has 4 layers" in notice
    _, notices = sliced({"num_hidden_layers": 6, "sliding_window_pattern": 3}, [0, 2, 4], 6)
    assert any("`sliding_window_pattern` tells layers apart by their number" in notice for notice in notices)
    assert with_depths(None, []) == (None, [])
