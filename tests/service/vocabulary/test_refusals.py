"""Models and tokenizers that no vocabulary can be made of: told in words, in bounded time and memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from service.vocabulary import filling as limits
from service.vocabulary import templates
from tests.checkpoints import read_checkpoint, write_checkpoint
from tests.service.vocabulary.models import EMBEDDING, HEAD, ONE, THREE, TWO, planned, write_model
from workers.errors import PlanError

pytestmark = pytest.mark.fast


def problems(places: list[Path], **more: Any) -> list[str]:
    """What keeps models from being merged by their tokens."""
    with pytest.raises(PlanError) as caught:
        planned(places, base_model=str(places[0]), **more)
    return list(caught.value.problems)


def with_tensor(place: Path, name: str, tensor: torch.Tensor) -> Path:
    """The model with another tensor of this name."""
    config = json.loads((place / "config.json").read_text())
    kept = {
        file: (place / file).read_text()
        for file in ("tokenizer.json", "tokenizer_config.json")
        if (place / file).exists()
    }
    return write_checkpoint(place, read_checkpoint(place) | {name: tensor}, config, extra_files=kept)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / f"m{n}", n, each) for n, each in ((1, ONE), (2, TWO))]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_rows_of_any_model_are_refused(name: str, dtype: torch.dtype, models: list[Path]) -> None:
    with_tensor(models[1], name, torch.zeros(10, 8).to(dtype))
    says = f"{models[1]}: {name} is {'I8' if dtype == torch.int8 else 'F8_E4M3'}"
    assert sum(says in problem for problem in problems(models, tokenizer_source="union")) == 1


def test_integers_are_no_rows_though_the_recipe_says_so(models: list[Path]) -> None:
    for place in models:
        with_tensor(place, "model.position_ids", torch.zeros(8, 8, dtype=torch.int64))
    found = problems(models, tokenizer={"source": "union", "embeddings": ["model.position_ids"]})
    assert len(found) == 2
    assert all("model.position_ids is I64" in problem for problem in found)


@pytest.mark.parametrize("shape", [(), (8,), (8, 2, 4)])
@pytest.mark.parametrize("which", [0, 1])
def test_an_embedding_without_rows_and_columns_is_none(
    shape: tuple[int, ...], which: int, models: list[Path]
) -> None:
    with_tensor(models[which], EMBEDDING, torch.zeros(shape))
    assert any(EMBEDDING in problem for problem in problems(models, tokenizer_source="union"))


def test_templates_of_odd_names_are_none_of_those_asked_for(models: list[Path]) -> None:
    odd = [{"name": [1], "template": "x"}, {"template": "y"}, {"name": {}, "template": "z"}]
    assert templates.template_of({"chat_template": odd}, None) is None
    named = [*odd, {"name": "default", "template": "{{ 'T' }}"}]
    assert templates.template_of({"chat_template": named}, None) == "{{ 'T' }}"
    for place in models:
        (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": odd}))
    assert planned(models, vocabularies="ignore", mismatched_tensors="base", chat_template="auto").plan.parts


def with_tokens(place: Path, tokens: dict[str, int]) -> Path:
    """The model with a tokenizer of these tokens."""
    document = json.loads(ONE.to_str())
    document["model"]["vocab"] |= tokens
    (place / "tokenizer.json").write_text(json.dumps(document))
    return place


def test_one_high_number_makes_no_vocabulary_of_millions(models: list[Path]) -> None:
    with_tokens(models[0], {"far": (1 << 24) - 1})
    started = time.process_time()
    for source, rows in (("base", 1 << 24), ("union", (1 << 24) + 4)):
        (problem,) = problems(models, tokenizer_source=source)
        assert problem.startswith(f"{models[0]}: ")
        assert f"{rows} rows, more than the 2097152" in problem
    assert time.process_time() - started < 2


def test_numbers_far_beyond_the_rows_that_there_are_make_no_output(models: list[Path]) -> None:
    with_tokens(models[0], {"far": 100_000})
    (problem,) = problems(models, tokenizer_source="base")
    assert problem.startswith(f"{models[0]}: its tokenizer numbers tokens up to 100000")
    with_tokens(models[0], {"near": 100})
    assert planned(models, base_model=str(models[0]), tokenizer_source="base").plan.parts


def test_padding_counts_among_the_rows(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROWS", 15)
    assert planned(models, base_model=str(models[0]), tokenizer_source="union").plan.parts
    (problem,) = problems(models, tokenizer={"source": "union", "pad_to_multiple_of": 16})
    assert "16 rows, more than the 15" in problem


def test_rows_of_all_models_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [write_model(tmp_path / f"m{n}", n, each) for n, each in ((1, ONE), (2, TWO), (3, THREE))]
    monkeypatch.setattr(limits, "MAX_MODEL_ROWS", 2 * 3 * 14)
    assert planned(places, base_model=str(places[0]), tokenizer_source="union").plan.parts
    monkeypatch.setattr(limits, "MAX_MODEL_ROWS", 2 * 3 * 14 - 1)
    (problem,) = problems(places, tokenizer_source="union")
    assert "14 rows in each of 2 tensors of 3 models, more than the 83" in problem


def test_rows_from_many_places_are_counted_before_any_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hand-worked: each model lacks the 8 tokens of the other, so those rows are single ones, and has its own in a run.
    words = [[f"{letter}{number}" for number in range(8)] for letter in "ab"]
    document = json.loads(ONE.to_str())
    places = []
    for number, own in enumerate(words):
        place = write_model(tmp_path / f"m{number}", number, None, rows=8)
        document["model"] |= {"vocab": {word: row for row, word in enumerate(own)}, "merges": []}
        document["added_tokens"] = []
        (place / "tokenizer.json").write_text(json.dumps(document))
        places.append(place)
    counted = 2 * 2 * (1 + 8)  # tensors, models, runs
    monkeypatch.setattr(limits, "MAX_ROW_RANGES", counted)
    assert planned(places, base_model=str(places[0]), tokenizer_source="union").plan.parts
    monkeypatch.setattr(limits, "MAX_ROW_RANGES", counted - 1)
    (problem,) = problems(places, tokenizer_source="union")
    assert f"{counted} ranges of rows, more than the {counted - 1}" in problem
