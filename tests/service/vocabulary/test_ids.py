"""Numbers of tokens in configs: they follow their tokens, wherever they are nested, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.vocabulary.ids import Renumbering, is_token_number, renumbered, with_size

pytestmark = pytest.mark.fast

OLD = {"<s>": 0, "</s>": 1, "<pad>": 2, "<im>": 3}
NEW = {"<im>": 0, "<s>": 5, "</s>": 6}


@pytest.mark.parametrize(
    ("config", "expected", "lost"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1}, {"bos_token_id": 5, "eos_token_id": 6}, []),
        ({"eos_token_id": [1, 3, 2]}, {"eos_token_id": [6, 0]}, ["eos_token_id: 2"]),
        ({"pad_token_id": 2}, {"pad_token_id": 77}, ["pad_token_id: 2"]),
        ({"pad_token_id": [2]}, {"pad_token_id": 77}, ["pad_token_id: 2"]),
        ({"sep_token_id": 2}, {"sep_token_id": None}, ["sep_token_id: 2"]),
        ({"pad_token_id": None, "eos_token_id": -1}, {"pad_token_id": None, "eos_token_id": -1}, []),
        ({"eos_token_id": True}, {"eos_token_id": True}, []),
        ({"image_token_index": 3, "image_token_id": 3}, {"image_token_index": 0, "image_token_id": 0}, []),
        ({"bos_token_id": 99}, {"bos_token_id": 99}, []),
        ({"suppress_tokens": [0, 1], "bad_words_ids": [[0, 3], [2]]},
         {"suppress_tokens": [5, 6], "bad_words_ids": [[5, 0]]}, ["bad_words_ids: 2"]),
        ({"forced_decoder_ids": [[1, 0], [2, 3]]}, {"forced_decoder_ids": [[1, 5], [2, 0]]}, []),
        ({"text_config": {"bos_token_id": 0, "x": 0}}, {"text_config": {"bos_token_id": 5, "x": 0}}, []),
        ({"hidden_size": 1, "max_new_tokens": 1, "num_hidden_layers": 2, "token": 1},
         {"hidden_size": 1, "max_new_tokens": 1, "num_hidden_layers": 2, "token": 1}, []),
    ],
)  # fmt: skip
def test_numbers_follow_their_tokens(
    config: dict[str, Any], expected: dict[str, Any], lost: list[str]
) -> None:
    renumbering = Renumbering(OLD, NEW)
    assert renumbered(config, renumbering, {"pad": 77}) == expected
    assert renumbering.lost == lost


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("bos_token_id", True), ("decoder_start_token_id", True), ("image_token_index", True), ("token_ids", True),
        ("suppress_tokens", True), ("num_image_tokens", False), ("max_new_tokens", False), ("vocab_size", False),
        ("tokens_per_second", False), ("token_type_ids", False),
    ],
)  # fmt: skip
def test_which_keys_are_numbers_of_tokens(key: str, is_one: bool) -> None:
    assert is_token_number(key) is is_one


@given(st.permutations(sorted(OLD.values())), st.lists(st.sampled_from(sorted(OLD.values()))))
def test_there_and_back_is_the_same(order: list[int], numbers: list[int]) -> None:
    new = dict(zip(OLD, order, strict=True))
    config = {"eos_token_id": numbers, "bos_token_id": 0}
    there = renumbered(config, Renumbering(OLD, new), {})
    assert renumbered(there, Renumbering(new, OLD), {}) == config


def test_the_size_changes_where_it_was_the_old_one() -> None:
    config = {"vocab_size": 9, "text_config": {"vocab_size": 10}, "vision_config": {"vocab_size": 3}}
    assert with_size(config, 10, 12) == {
        "vocab_size": 12,
        "text_config": {"vocab_size": 12},
        "vision_config": {"vocab_size": 3},
    }
    assert with_size({"hidden_size": 10}, 10, 12) == {"hidden_size": 10}
