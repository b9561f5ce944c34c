"""Vocabularies merged on disk: what every row of the output is made of, its tokenizer, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from service.running.publish import _small_files
from tests.adapters import PREFIX, write_adapter
from tests.service.vocabulary.models import (
    EMBEDDING,
    HEAD,
    ONE,
    THREE,
    TWO,
    planned,
    rows,
    vocabulary,
    write_model,
)
from tests.tokenizers import bpe, files
from workers.errors import PlanError

pytestmark = pytest.mark.fast


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    made = zip((1, 2, 3), (ONE, TWO, THREE), strict=True)
    return [write_model(tmp_path / f"m{number}", number, tokenizer) for number, tokenizer in made]


def base(place: Path) -> dict[str, str]:
    return {"base_model": str(place)}


def by_token(found: Any, values: list[float]) -> dict[str, float]:
    return {token: values[number] for token, number in vocabulary(found).items()}


def test_a_union_has_every_token_and_the_bases_rows_for_those_that_a_model_lacks(
    models: list[Path], tmp_path: Path
) -> None:
    # Hand-worked: `d` is row 6 of the second model and row 5 of the third, and the base has none.
    found = planned(models, [1, 0, 0], **base(models[0]), tokenizer_source="union")
    values = by_token(found, rows(found, tmp_path / "out"))
    assert values == {
        "<unk>": 1000, "<s>": 1001, "</s>": 1002, "a": 1003, "b": 1004, "c": 1005, "ab": 1006, "<x>": 1007,
        "d": (2006 + 3005) / 2, "bc": 2007, "e": 3007, "<sys>": 2008, "<y>": (2009 + 3009) / 2, "<z>": 3010,
    }  # fmt: skip
    second = planned(models, [0, 1, 0], **base(models[0]), tokenizer_source="union")
    values = by_token(second, rows(second, tmp_path / "second"))
    assert values == {
        "<unk>": 2000, "<s>": 2001, "</s>": 2002, "a": 2005, "b": 2004, "c": 2003, "ab": 1006, "<x>": 1007,
        "d": 2006, "bc": 2007, "e": 3007, "<sys>": 2008, "<y>": 2009, "<z>": 3010,
    }  # fmt: skip


def test_a_union_numbers_the_bases_tokens_first_then_own_then_added_ones(models: list[Path]) -> None:
    found = planned(models, tokenizer_source="union")
    order = sorted(vocabulary(found), key=vocabulary(found).__getitem__)
    assert order == [
        "<unk>", "<s>", "</s>", "a", "b", "c", "ab", "<x>", "d", "bc", "e", "<sys>", "<y>", "<z>",
    ]  # fmt: skip
    built = tokenizers.Tokenizer.from_str(found.texts["tokenizer.json"].decode())
    assert built.encode("ab<sys>c<y>").tokens == ["ab", "<sys>", "c", "<y>"]
    assert built.decode(built.encode("ab<sys>").ids, skip_special_tokens=True) == "ab"  # it is still special
    assert found.texts["tokenizer.json"] == planned(models, tokenizer_source="union").texts["tokenizer.json"]


def test_without_a_base_a_missing_row_is_the_mean_of_those_that_there_are(
    models: list[Path], tmp_path: Path
) -> None:
    found = planned(models, [0, 1, 0], tokenizer_source="union")
    values = by_token(found, rows(found, tmp_path / "out"))
    assert values["ab"] == (1006 + 3008) / 2
    assert values["<x>"] == 1007


@pytest.mark.parametrize("source", ["base", "model"])
def test_another_models_tokens_in_their_order(source: str, models: list[Path], tmp_path: Path) -> None:
    chosen = models[0] if source == "base" else models[1]
    named = source if source == "base" else str(chosen)
    found = planned(models, [0, 0, 1], **base(models[0]), tokenizer_source=named)
    values = rows(found, tmp_path / "out")
    expected = {
        "base": [3000, 3001, 3002, 3003, 3004, 3006, 3008, 1007],
        "model": [3000, 3001, 3002, 3006, 3004, 3003, 3005, 2007, 2008, 3009],
    }
    assert values == expected[source]
    assert "tokenizer.json" not in found.texts  # the model's own file is copied as it is
    assert found.tokenizer.uri == f"file://{chosen}"


def test_heads_are_merged_by_token_too_and_tied_ones_by_their_embedding(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    two = write_model(tmp_path / "two", 2, TWO, tied=True)
    found = planned([one, two], [0, 1], **base(one), tokenizer_source="union")
    values = by_token(found, rows(found, tmp_path / "out", HEAD))
    assert values["d"] == 2006  # the embedding of the tied model stands for its head
    assert values["ab"] == 1006.5  # and its missing row is the base's head's
    both = [write_model(tmp_path / f"tied{n}", n, t, tied=True) for n, t in ((1, ONE), (2, TWO))]
    tied = planned(both, [0, 1], **base(both[0]), tokenizer_source="union")
    assert HEAD not in tied.plan.weight_map
    assert by_token(tied, rows(tied, tmp_path / "tied"))["ab"] == 1006


def test_single_tokens_come_from_where_the_recipe_says(models: list[Path], tmp_path: Path) -> None:
    at = [str(place) for place in models]
    tokens = {
        "<y>": {"source": {"kind": "zero"}},
        "c": {"source": {"kind": "zero"}, "force": True},
        "e": {"source": {"kind": "model_token", "model": at[1], "token": "<sys>"}},
        "d": {"source": {"kind": "model_token", "model": at[0], "token_id": 3}, "force": True},
        "a": {"source": at[1], "force": True},
        "<new>": {"source": {"kind": "model_token", "model": at[1], "token": "<sys>"}},
    }
    tokenizer = {"source": "union", "tokens": tokens}
    seen = []
    for weights in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]):
        found = planned(models, weights, **base(models[0]), tokenizer=tokenizer)
        values = by_token(found, rows(found, tmp_path / f"{weights}"))
        seen.append([values[token] for token in ("<y>", "c", "e", "d", "a", "<new>")])
    assert seen == [
        [0, 0, 2008, 1003, 2005, 2008],
        [2009, 0, 2008, 1003, 2005, 2008],
        [3009, 0, 3007, 1003, 2005, 2008],
    ]


def test_a_new_token_goes_to_the_bases_tokenizer_too(models: list[Path], tmp_path: Path) -> None:
    tokenizer = {"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}}
    found = planned(models, **base(models[0]), tokenizer=tokenizer)
    assert vocabulary(found)["<new>"] == 8
    assert rows(found, tmp_path / "out")[8] == 0


def test_the_order_in_which_tokens_are_written_changes_nothing(models: list[Path]) -> None:
    said = {f"<{name}>": {"source": {"kind": "zero"}} for name in "qpr"}
    turned = dict(reversed(said.items()))
    one, two = (
        planned(models, tokenizer={"source": "union", "tokens": tokens}).texts["tokenizer.json"]
        for tokens in (said, turned)
    )
    assert one == two


def test_padding_adds_rows_of_zeros_and_the_config_says_how_many(models: list[Path], tmp_path: Path) -> None:
    found = planned(models, **base(models[0]), tokenizer={"source": "union", "pad_to_multiple_of": 16})
    values = rows(found, tmp_path / "out")
    assert len(values) == 16
    assert values[14:] == [0, 0]
    assert 0 not in values[:14]
    assert (found.inputs.reference.config or {})["vocab_size"] == 16
    assert "16 rows, the last of them zeros" in found.plan.notices[-1]


def test_rows_beyond_the_tokens_are_left_out_where_anything_differs(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE, rows=20)
    two = write_model(tmp_path / "two", 2, TWO, rows=24)
    found = planned([one, two], [0, 1], **base(one), tokenizer_source="base")
    assert rows(found, tmp_path / "out") == [2000, 2001, 2002, 2005, 2004, 2003, 1006, 1007]
    assert any("rows of padding are left out (20 → 8)" in notice for notice in found.plan.notices)


def test_where_nothing_differs_all_rows_stay_and_files_are_copied(tmp_path: Path) -> None:
    places = [write_model(tmp_path / f"m{number}", number, ONE, rows=20) for number in (1, 2)]
    for source in ("base", "union", str(places[1])):
        found = planned(places, [0, 1], **base(places[0]), tokenizer_source=source)
        assert rows(found, tmp_path / source.strip("/").replace("/", "-"))[:3] == [2000, 2001, 2002]
        assert len(rows(found, tmp_path / "again")) == 20
        assert not found.texts
        assert found.plan.weight_map == planned(places, [0, 1]).plan.weight_map


def test_a_tokenizer_with_more_tokens_than_its_model_has_rows_lacks_the_last(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    short = write_model(tmp_path / "short", 2, TWO, rows=8)
    found = planned([one, short], [0, 1], **base(one), tokenizer_source="union")
    assert not {"<sys>", "<y>"} & vocabulary(found).keys()
    tokens = {"a": {"source": {"kind": "model_token", "model": str(short), "token": "<sys>"}}}
    with pytest.raises(PlanError, match="has no token '<sys>'"):
        planned([one, short], **base(one), tokenizer={"source": "union", "tokens": tokens})
    assert by_token(found, rows(found, tmp_path / "out"))["bc"] == 2007


def test_numbers_follow_their_tokens(tmp_path: Path) -> None:
    words = ["a", "b", "c"]
    said = {"eos_token_id": 6, "pad_token_id": 6, "text_config": {"vocab_size": 7, "eos_token_id": [6, 2]}}
    generation = json.dumps({"eos_token_id": [6, 2], "bos_token_id": 1, "max_new_tokens": 6})
    one = write_model(
        tmp_path / "one",
        1,
        bpe(words, special=["<im>"]),
        config=said,
        more={"generation_config.json": generation},
    )
    two = write_model(tmp_path / "two", 2, bpe(words, special=["<fim>", "<im>"]), config={"eos_token_id": 6})
    found = planned([one, two], **base(one), tokenizer_source=str(two))
    config = found.inputs.reference.config or {}
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (7, 7, 1)
    assert config["text_config"] == {"vocab_size": 8, "eos_token_id": [7, 2]}
    assert config["vocab_size"] == 8
    assert "generation_config.json" not in found.copied
    written = json.loads(found.texts["generation_config.json"])
    assert written == {"eos_token_id": [7, 2], "bos_token_id": 1, "max_new_tokens": 6}
    lost = planned([two, one], **base(two), tokenizer_source=str(one), dtype="float32")
    assert (lost.inputs.reference.config or {})["eos_token_id"] == 2  # as tokenizer_config.json says
    assert any(
        "eos_token_id: 6 is the number of a token that the output" in told for told in lost.plan.notices
    )


def test_files_of_the_old_vocabulary_stay_behind(models: list[Path]) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "notes.txt"):
        (models[0] / name).write_text("{}")
    (models[0] / "chat_template.jinja").write_text("{{ 'T' }}")
    found = planned(models, **base(models[0]), tokenizer_source="union")
    assert found.copied.keys() == {"special_tokens_map.json", "notes.txt", "chat_template.jinja"}
    assert found.texts.keys() == {"tokenizer.json", "tokenizer_config.json"}
    plain = planned(models, **base(models[0]), tokenizer_source="base")
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= plain.copied.keys()


def test_what_is_written_is_what_the_plan_says(models: list[Path]) -> None:
    class Copies:
        def read(self, uri: str, _etag: str) -> bytes:
            return Path(uri.removeprefix("file://")).read_bytes()

    found = planned(models, **base(models[0]), tokenizer_source="union", chat_template="chatml")
    written = dict(_small_files(found, Copies()))  # type: ignore[arg-type]
    assert written.keys() == {
        "README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert json.loads(written["config.json"])["vocab_size"] == 14


def test_half_precision_rows_are_averaged_in_float32(tmp_path: Path) -> None:
    made = ((1, ONE), (2, TWO), (3, THREE))
    places = [write_model(tmp_path / f"{n}", n, each, dtype=torch.bfloat16) for n, each in made]
    found = planned(places, [1, 0, 0], tokenizer_source="union", dtype="float32")
    values = by_token(found, rows(found, tmp_path / "out"))
    two, three = (float(torch.tensor(value, dtype=torch.bfloat16)) for value in (2006, 3005))
    assert values["d"] == (two + three) / 2
    kept = planned(places, [1, 0, 0], tokenizer_source="union")
    run_rows = rows(kept, tmp_path / "kept")
    assert by_token(kept, run_rows)["d"] == float(torch.tensor((two + three) / 2, dtype=torch.bfloat16))


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    bare = write_model(tmp_path / "bare", 2, None, rows=8)
    two = write_model(tmp_path / "two", 3, TWO)
    found = planned([one, bare, two], [0, 1, 0], **base(one), tokenizer_source="union")
    assert by_token(found, rows(found, tmp_path / "out"))["<x>"] == 2007
    assert any("has no tokenizer; taken to be that of" in notice for notice in found.plan.notices)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tokens": {"<y>": {"source": "{2}"}, "<sys>": {"source": "{2}"}}}, "has no token '<sys>'"),
        (
            {"tokens": {"a": {"source": {"kind": "model_token", "model": "{0}", "token": "nope"}}}},
            "tokenizer.tokens.a.source: ",
        ),
        (
            {"tokens": {"a": {"source": {"kind": "model_token", "model": "{0}", "token_id": 99}}}},
            "99 is beyond the 8 rows of",
        ),
        ({"embeddings": ["nope"]}, "tokenizer.embeddings: "),
    ],
)
def test_what_a_recipe_says_of_tokens_has_to_be_there(
    more: dict[str, Any], says: str, models: list[Path]
) -> None:
    text = json.dumps(more)
    for number, place in enumerate(models):
        text = text.replace(f"{{{number}}}", str(place))
    with pytest.raises(PlanError) as caught:
        planned(models, **base(models[0]), tokenizer={"source": "union", **json.loads(text)})
    assert says in str(caught.value)


@pytest.mark.parametrize("source", ["union", "base"])
def test_sentencepiece_alone_is_refused_with_what_to_do(source: str, tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    two = write_model(tmp_path / "two", 2, None, rows=9, more={"tokenizer.model": "pieces"})
    with pytest.raises(PlanError, match=r"of its tokenizer there is only tokenizer\.model.*save_pretrained"):
        planned([one, two], **base(one), tokenizer_source=source)


def test_one_that_cannot_be_merged_is_one_problem(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    two = write_model(tmp_path / "two", 2, None, rows=9, more={"spiece.model": "pieces"})
    with pytest.raises(PlanError) as caught:
        planned([one, two], tokenizer_source="union")
    assert len(caught.value.problems) == 1


def test_models_that_have_only_sentencepiece_are_copied_as_ever(tmp_path: Path) -> None:
    places = [write_model(tmp_path / f"{n}", n, None, more={"tokenizer.model": "pieces"}) for n in (1, 2)]
    assert "tokenizer.model" in planned(places).copied
    for source in ("base", str(places[1])):
        assert "tokenizer.model" in planned(places, tokenizer_source=source).copied


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"": "1"}}}']
)
def test_a_tokenizer_that_is_none_is_refused_where_it_is_needed_only(text: str, models: list[Path]) -> None:
    (models[1] / "tokenizer.json").write_text(text)
    with pytest.raises(PlanError, match=r"tokenizer\.json is not"):
        planned(models, **base(models[0]), tokenizer_source="union")
    same = [models[0], write_model(models[0].parent / "same", 4, ONE)]
    (same[1] / "tokenizer.json").write_text(text)
    assert planned(same).plan.parts


def test_different_vocabularies_without_an_option_are_an_error_that_says_what_to_write(
    tmp_path: Path,
) -> None:
    one = write_model(tmp_path / "one", 1, bpe(["a", "b", "c"]), rows=16)
    two = write_model(tmp_path / "two", 2, bpe(["a", "c", "b"], added=["<x>"]), rows=16)
    with pytest.raises(PlanError) as caught:
        planned([one, two])
    (problem,) = caught.value.problems
    assert problem == (
        f"{two}: its vocabulary is not that of {one}: 3 rows differ, row 4 is 'c', not 'b'; set `tokenizer_source: "
        "union` (or `base`, or a model) to merge the rows by their tokens, or `vocabularies: ignore` to merge them as "
        "they are"
    )
    assert planned([one, two], vocabularies="ignore").plan.parts
    swapped = write_model(tmp_path / "swapped", 4, bpe(["a", "c", "b"]), rows=16)
    with pytest.raises(PlanError, match="2 rows differ, row 4 is 'c', not 'b'"):
        planned([one, swapped])
    assert planned([one, two], tokenizer_source="union").plan.parts
    wider = write_model(tmp_path / "wider", 3, bpe(["a", "b", "c", "d"]), rows=17)
    with pytest.raises(PlanError, match="tokenizer_source: union") as wide:
        planned([one, wider])
    assert len(wide.value.problems) == 1  # that the sizes differ is not said again
    assert planned([one, wider], mismatched_tensors="base").plan.parts


def test_settings_list_the_new_tokens_where_they_list_any(models: list[Path]) -> None:
    settings = {"eos_token": "</s>", "added_tokens_decoder": {"7": {"content": "<x>", "special": False}}}
    (models[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    found = planned(models, **base(models[0]), tokenizer_source="union")
    listed = json.loads(found.texts["tokenizer_config.json"])["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in listed.items()}.items() <= vocabulary(
        found
    ).items()
    assert listed["11"]["special"] is True


def test_two_places_of_one_tokenizer_are_one(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1, ONE)
    two = write_model(
        tmp_path / "two", 2, ONE, more={"tokenizer.json": json.dumps(json.loads(ONE.to_str()), indent=4)}
    )
    assert (one / "tokenizer.json").read_text() != (two / "tokenizer.json").read_text()
    assert planned([one, two]).plan.parts  # other text, same tokens
    assert files(ONE)["tokenizer.json"] == ONE.to_str()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_model_with_an_adapter_is_another_than_the_one_below_it(is_first: bool, tmp_path: Path) -> None:
    """At one URI there are two embeddings then: the model's, and the one that its adapter saved."""
    below, other = write_model(tmp_path / "base", 1, ONE), write_model(tmp_path / "other", 2, TWO)
    saved = {f"{PREFIX}{name}": torch.full((8, 8), 7.0) for name in (EMBEDDING, HEAD)}
    lora = write_adapter(tmp_path / "lora", saved, modules_to_save=["embed_tokens", "lm_head"])
    seen = {}
    for chosen in (0, 1):
        weights = {f"{below}+{lora}": 1.0 - chosen, str(other): float(chosen)}
        places = sorted(weights, key=str(other).__eq__, reverse=not is_first)
        found = planned(places, [weights[place] for place in places], **base(below), tokenizer_source="union")
        values = by_token(found, rows(found, tmp_path / f"out{chosen}"))
        seen[chosen] = [values[token] for token in ("ab", "<x>", "a", "bc")]
    assert seen == {0: [7, 7, 7, 2007], 1: [1006, 1007, 2005, 2007]}
