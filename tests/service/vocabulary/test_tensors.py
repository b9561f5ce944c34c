"""Which tensors have a row for each token, of the shapes that are about."""

from __future__ import annotations

import pytest

from service.vocabulary.tensors import row_shape, rows_of, vocabulary_tensors, with_rows
from tests.service.headers import Spec, checkpoint

pytestmark = pytest.mark.fast

V, H = 100, 16


def of(tensors: dict[str, tuple[int, ...]], uri: str = "file:///m", **more: object) -> object:
    spec: Spec = {name: ("F32", shape) for name, shape in tensors.items()}
    return checkpoint(uri, spec, **more)  # type: ignore[arg-type]


LLAMA = {
    "model.embed_tokens.weight": (V, H),
    "model.layers.0.mlp.up_proj.weight": (V, H),
    "model.layers.1.mlp.up_proj.weight": (V, H),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
}
T5 = {
    "shared.weight": (V, H),
    "encoder.embed_tokens.weight": (V, H),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (V, 2),
    "encoder.block.1.layer.0.SelfAttention.q.weight": (H, H),
    "decoder.embed_tokens.weight": (V, H),
    "lm_head.weight": (V, H),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": (V, H),
    "bert.embeddings.position_embeddings.weight": (V, H),
    "bert.embeddings.token_type_embeddings.weight": (2, H),
    "bert.pooler.dense.weight": (V, V),
    "cls.predictions.bias": (V,),
    "cls.predictions.decoder.weight": (V, H),
    "cls.predictions.decoder.bias": (V,),
}
BART = {
    "model.shared.weight": (V, H),
    "final_logits_bias": (1, V),
    "model.encoder.layernorm_embedding.weight": (H,),
}
GPT2 = {"transformer.wte.weight": (V, H), "transformer.wpe.weight": (V, H), "transformer.ln_f.weight": (V,)}
VISION = {
    "model.language_model.embed_tokens.weight": (V, H),
    "model.visual.patch_embed.proj.weight": (V, H),
    "lm_head.weight": (V, H),
    "vision_tower.embeddings.class_embedding": (V,),
}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
        (T5, ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]),
        (BERT, ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight",
                "cls.predictions.decoder.bias"]),
        (BART, ["model.shared.weight", "final_logits_bias"]),
        (GPT2, ["transformer.wte.weight"]),
        (VISION, ["model.language_model.embed_tokens.weight", "lm_head.weight"]),
    ],
)  # fmt: skip
def test_embeddings_and_heads_are_found_by_shape_and_name(
    tensors: dict[str, tuple[int, ...]], expected: list[str]
) -> None:
    found = vocabulary_tensors(of(tensors), [])  # type: ignore[arg-type]
    assert (found.names, found.problems) == (expected, [])


def test_what_a_size_and_a_name_do_not_tell_is_an_error_that_names_the_option() -> None:
    odd = LLAMA | {"projector.linear.weight": (V, H)}
    (problem,) = vocabulary_tensors(of(odd), []).problems  # type: ignore[arg-type]
    assert "projector.linear.weight [100, 16]" in problem
    assert "tokenizer: {embeddings: [...]}" in problem
    found = vocabulary_tensors(of(odd), [], ["lm_head.weight"])  # type: ignore[arg-type]
    assert (found.names, found.problems) == (["lm_head.weight"], [])


@pytest.mark.parametrize(("rows", "is_one"), [(120, True), (100, False)])
def test_another_models_sizes_decide_where_they_differ(rows: int, is_one: bool) -> None:
    odd = LLAMA | {"projector.linear.weight": (V, H)}
    other = {"model.embed_tokens.weight": (120, H), "projector.linear.weight": (rows, H)}
    found = vocabulary_tensors(of(odd), [of(other, "file:///other")])  # type: ignore[arg-type, list-item]
    assert ("projector.linear.weight" in found.names) is is_one
    assert not found.problems


def test_without_an_embedding_the_config_says_how_many_and_else_nobody() -> None:
    bare = {"unembed.matrix": (V, H)}
    assert rows_of(of(bare, config={"text_config": {"vocab_size": 7}})) == 7  # type: ignore[arg-type]
    assert "no `vocab_size`" in vocabulary_tensors(of(bare), []).problems[0]  # type: ignore[arg-type]
    wrong = vocabulary_tensors(of(bare, config={"vocab_size": 7}), [])  # type: ignore[arg-type]
    assert "no tensor has 7 rows" in wrong.problems[0]


@pytest.mark.parametrize(
    ("shape", "rows", "resized"),
    [
        ((V, H), (V, H), (7, H)), ((V,), (V, 1), (7,)), ((1, V), (V, 1), (1, 7)), ((1, V, H), (V, H), (1, 7, H)),
        ((V, 2, 3), (V, 6), (7, 2, 3)),
    ],
)  # fmt: skip
def test_rows_of_a_shape(shape: tuple[int, ...], rows: tuple[int, int], resized: tuple[int, ...]) -> None:
    assert row_shape(shape) == rows
    assert with_rows(shape, 7) == resized
