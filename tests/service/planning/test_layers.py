"""Layers by their numbers: which stacks there are, what is outside, and which one a range of layers means."""

from __future__ import annotations

import pytest

from service.planning.layers import is_before, main_stacks, stacks_of

pytestmark = pytest.mark.fast

MIXTRAL = [f"model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight" for n in range(3) for e in range(8)]
T5 = [
    f"{part}.block.{n}.layer.{m}.weight"
    for part in ("encoder", "decoder")
    for n in range(4)
    for m in range(2)
]
TOWERS = [f"vision_tower.encoder.layers.{n}.w" for n in range(2)] + [f"model.layers.{n}.w" for n in range(5)]


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["model.layers.0.w", "model.layers.1.w", "lm_head.weight"], {"model.layers.": 2}),
        ([f"transformer.h.{n}.attn.c_attn.weight" for n in range(12)], {"transformer.h.": 12}),
        ([f"0.auto_model.encoder.layer.{n}.w" for n in range(3)], {"0.auto_model.encoder.layer.": 3}),
        (TOWERS, {"vision_tower.encoder.layers.": 2, "model.layers.": 5}),
        (["projector.0.weight", "projector.2.weight"], {}),
        (["layers.1.w", "layers.2.w"], {}),
        (["layers.00.w", "layers.0", "layer0.w", "layers.0x.w"], {}),
    ],
)
def test_stacks_are_found_by_numbers_without_gaps(names: list[str], depths: dict[str, int]) -> None:
    found = stacks_of(names)
    used = {place.stack for name in names if (place := found.place(name)) is not None}
    assert {stack: found.depths[stack] for stack in used} == depths


def test_the_outermost_number_of_several_is_the_layers() -> None:
    for names, stack, depth in ((MIXTRAL, "model.layers.", 3), (T5, "encoder.block.", 4)):
        found = stacks_of(names)
        place = found.place(names[-1] if stack == "model.layers." else "encoder.block.3.layer.1.weight")
        assert place is not None
        assert (place.stack, place.layer, found.depths[place.stack]) == (stack, depth - 1, depth)
    alone = stacks_of(["model.layers.0.w", "head.0.w", "head.1.w"])
    assert alone.place("model.layers.0.w") == ("model.layers.", 0, "w")
    assert alone.position("model.layers.0.w") == 1.0
    assert alone.position("norm.weight") == 0.0


def test_endless_names_take_no_time() -> None:
    endless = ".".join(["0"] * 200_000) + ".w"
    assert stacks_of([endless]).place(endless) == ("", 0, endless[2:])


def test_a_range_of_layers_means_the_stack_that_is_as_deep_as_the_config_says() -> None:
    found = stacks_of(TOWERS)
    stacks = list(found.depths)
    assert main_stacks(stacks, found.depths, {"num_hidden_layers": 5}) == ["model.layers."]
    assert main_stacks(stacks, found.depths, {"text_config": {"num_hidden_layers": 5}}) == ["model.layers."]
    assert main_stacks(stacks, found.depths, {"vision_config": {"num_hidden_layers": 2}}) == stacks
    assert main_stacks(stacks, found.depths, None) == stacks
    assert main_stacks(stacks[:1], found.depths, {"num_hidden_layers": 5}) == stacks[:1]


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("model.embed_tokens.weight", True), ("transformer.wte.weight", True), ("transformer.wpe.weight", True),
        ("shared.weight", True), ("bert.embeddings.LayerNorm.bias", True), ("gpt_neox.embed_in.weight", True),
        ("vision_tower.encoder.layers.0.w", True), ("multi_modal_projector.linear_1.weight", True),
        ("model.visual.merger.mlp.0.weight", True), ("model.encoder.conv1.weight", True),
        ("gpt_neox.embed_out.weight", False), ("embed_out.weight", False), ("lm_head.weight", False),
        ("model.norm.weight", False), ("transformer.ln_f.bias", False), ("bert.pooler.dense.weight", False),
        ("cls.predictions.decoder.weight", False), ("score.weight", False), ("encoder.final_layer_norm.weight", False),
    ],
)  # fmt: skip
def test_what_feeds_the_first_layer_is_told_from_what_follows_the_last(name: str, before: bool) -> None:
    assert is_before(name) is before
