"""The comparison over vocabularies itself: it has every feature often enough, and sees what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

from service.recipe import parse_recipe
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.oracle.vocabularies import FEATURES, SHAPE, TEXTS, Worded, compare_words, worded
from tests.tokenizers import bpe, files

pytestmark = pytest.mark.fast

ONE = bpe(["a", "b", "c"], added=["<x>", "<y>"])
OTHER_ORDER = bpe(["a", "b", "c"], added=["<y>", "<x>"])
RECIPE = {"merge_method": "linear", "models": [{"model": "in", "parameters": {"weight": 1}}]}
WORDED = Worded("one", RECIPE, frozenset(), order_decides=False)


def test_every_feature_is_in_twenty_recipes_and_all_of_them_can_be_read() -> None:
    recipes = [worded(number) for number in range(96)]
    counted = Counter(feature for recipe in recipes for feature in recipe.features)
    assert all(counted[feature] >= 20 for feature in FEATURES), counted
    for recipe in recipes:
        parse_recipe(recipe.placed(Path("/inputs")))


@pytest.mark.parametrize(
    ("change", "problem", "over"),
    [
        ("nothing", None, 0), ("order", None, 0), ("row", None, 16), ("size", "model.embed_tokens.weight is [8", 0),
        ("tokens", "only one has the tokens ['<y>']", 0), ("config", "config.json says 9 tokens", 0),
        ("eos", "eos_token_id is 1", 0), ("split", "'abc' is ", 0),
    ],
)  # fmt: skip
def test_what_differs_is_seen(change: str, problem: str | None, over: int, tmp_path: Path) -> None:
    tensors = llama_tensors(1, vocab=8, **SHAPE)
    config = llama_config(vocab=8, **SHAPE)
    place, ours, theirs = (tmp_path / name for name in ("in", "ours", "theirs"))
    write_checkpoint(place, tensors, config, extra_files=files(ONE))
    theirs_of, their_tokens = dict(tensors), ONE
    if change == "order":
        their_tokens = OTHER_ORDER
        order = torch.tensor([0, 1, 2, 3, 4, 5, 7, 6])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            theirs_of[name] = tensors[name][order]
    if change == "row":
        theirs_of["lm_head.weight"] = tensors["lm_head.weight"].clone()
        theirs_of["lm_head.weight"][6] += 1
    if change == "size":
        theirs_of["model.embed_tokens.weight"] = torch.zeros(9, 16)
    if change == "tokens":
        their_tokens = bpe(["a", "b", "c"], added=["<x>"])
    if change == "split":
        their_tokens = bpe(["a", "b", "c"], added=["<y>", "<x>"])
        their_tokens.pre_tokenizer = None
        their_tokens.normalizer = normalizers.Prepend("a")
        theirs_of = tensors
    write_checkpoint(theirs, theirs_of, config, extra_files=files(their_tokens))
    said = config | {"config": {"vocab_size": 9}, "eos": {"eos_token_id": 1}}.get(change, {})
    write_checkpoint(ours, tensors, said, extra_files=files(ONE))
    encoded = {text: ONE.encode(text).ids for text in TEXTS}
    found = compare_words(WORDED, tmp_path, ours, theirs, encoded, {})
    assert any(each.startswith(problem) for each in found.problems) if problem else not found.problems, (
        found.problems
    )
    if change != "split":
        assert found.distance.over == over


def test_numbers_that_transformers_reads_otherwise_are_seen(tmp_path: Path) -> None:
    tensors, config = llama_tensors(1, vocab=8, **SHAPE), llama_config(vocab=8, **SHAPE)
    for name in ("in", "ours", "theirs"):
        write_checkpoint(tmp_path / name, tensors, config, extra_files=files(ONE))
    encoded = {text: [] for text in TEXTS}
    found = compare_words(WORDED, tmp_path, tmp_path / "ours", tmp_path / "theirs", encoded, {})
    assert len(found.problems) == sum(bool(ONE.encode(text).ids) for text in TEXTS) > 4
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == 8
