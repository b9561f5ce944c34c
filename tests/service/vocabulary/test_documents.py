"""Vocabularies of earlier merges: later ones take their tokens, templates and files, as if each had been a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.oracle.ours import merge_in_process
from tests.service.vocabulary.models import ONE, THREE, TWO, write_model

pytestmark = pytest.mark.fast


def half(places: list[Path], **more: Any) -> dict[str, Any]:
    """A union of the first two, with a template of its own."""
    return {
        "merge_method": "linear",
        "models": [{"model": str(place), "parameters": {"weight": 0.5}} for place in places[:2]],
        "tokenizer_source": "union",
        "chat_template": "chatml",
        "dtype": "float32",
        **more,
    }


def last(half: str, third: Path, **more: Any) -> dict[str, Any]:
    """What is made of that and the third model."""
    models = [
        {"model": half, "parameters": {"weight": 0.25}},
        {"model": str(third), "parameters": {"weight": 0.75}},
    ]
    return {"merge_method": "linear", "models": models, "dtype": "float32", **more}


@pytest.mark.parametrize(
    "said",
    [
        lambda _: {"tokenizer_source": "union"},
        lambda _: {"tokenizer_source": "union", "chat_template": "auto"},
        lambda half: {"tokenizer_source": "base", "base_model": half},
        lambda half: {"tokenizer": {"source": "base", "pad_to_multiple_of": 32}, "base_model": half},
        lambda half: {"tokenizer": {"source": "union", "tokens": {"a": {"source": half, "force": True}}}},
        lambda half: {"tokenizer_source": half, "chat_template": half},
    ],
)
def test_a_later_merge_takes_the_words_of_an_earlier_one(
    said: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    places = [write_model(tmp_path / f"m{n}", n, own) for n, own in ((1, ONE), (2, TWO), (3, THREE))]
    alone, hand, together = (tmp_path / name for name in ("alone", "hand", "together"))
    merge_in_process({alone: half(places)})
    merge_in_process({hand: last(str(alone), places[2], **said(str(alone)))})
    merge_in_process({together: [last("half", places[2], **said("half")), half(places, name="half")]})
    assert contents(together) == contents(hand)
    held = tokenizers.Tokenizer.from_file(str(together / "tokenizer.json"))
    assert set(TWO.get_vocab()) <= set(held.get_vocab())
    assert "<|im_start|>" in (together / "chat_template.jinja").read_text()


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a checkpoint."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
