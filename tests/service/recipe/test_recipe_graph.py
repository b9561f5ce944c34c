"""Which documents of a recipe are run, in which order, and which of them is the output."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergemill.recipes import as_mapping, localise, read
from service.recipe import MAX_DOCUMENTS, MAX_PLACES, Graph, parse_documents, parse_documents_yaml
from workers.errors import RecipeError

pytestmark = pytest.mark.fast


def document(name: str | None, *models: str, **more: Any) -> dict[str, Any]:
    """A linear merge."""
    entries = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return ({} if name is None else {"name": name}) | {"merge_method": "linear", "models": entries} | more


ADAPTER: dict[str, Any] = {"output_kind": "adapter", "base_model": "/base"}
FISHER = {
    "merge_method": "fisher",
    "models": [{"model": "x", "fisher": "/f"}, {"model": "/a", "fisher": "x"}],
}


def problems(value: Any) -> list[str]:
    """What is wrong with a recipe."""
    with pytest.raises(RecipeError) as caught:
        parse_documents(value)
    return list(caught.value.problems)


def order(graph: Graph) -> list[str | None]:
    """The names of what is run."""
    return [graph.recipes[place].name for place in graph.order]


def test_each_runs_after_those_that_it_uses_wherever_they_are_written() -> None:
    graph = parse_documents(
        [document(None, "x", "y"), document("x", "/a", "y"), document("y", "/b", tokenizer_source="/b")]
    )
    assert order(graph) == ["y", "x", None]
    assert graph.names == ["/b", "/a"] or set(graph.names) == {"/a", "/b"}
    assert graph.output.name is None
    assert [recipe.name for _, recipe in graph.earlier] == ["y", "x"]


def test_one_document_is_a_recipe_as_ever_and_may_have_a_name() -> None:
    alone = document("x", "/a", "/b")
    for value in (alone, [alone], {"documents": [alone]}):
        graph = parse_documents(value)
        assert (graph.to_json(), order(graph), graph.names) == (alone, ["x"], ["/a", "/b"])


def test_several_are_a_list_or_a_mapping_or_yaml_and_come_back_as_one_mapping() -> None:
    two = [document("x", "/a", "/b"), document(None, "x", "/b")]
    graph = parse_documents(two)
    assert graph.to_json() == {"documents": two}
    for again in (graph.to_json(), two):
        assert parse_documents(again).canonical() == graph.canonical()
    text = graph.to_yaml({"/a": "org/a"})
    assert list(yaml.safe_load_all(text.replace("org/a", "/a"))) == two
    assert parse_documents_yaml(text + "---\n") == parse_documents_yaml(text)


def test_where_all_have_names_the_output_is_what_none_uses() -> None:
    assert parse_documents([document("y", "x"), document("x", "/a")]).output.name == "y"
    (problem,) = problems([document("x", "/a"), document("y", "/a")])
    assert "nothing uses 'x', 'y', and a recipe makes one output" in problem


def test_what_the_output_does_not_use_is_left_out_with_a_notice() -> None:
    graph = parse_documents([document("z", "x", "/z"), document("x", "/a"), document(None, "x")])
    assert order(graph) == ["x", None]
    assert graph.names == ["/a"]
    assert graph.notices == ["z: the output does not use this merge, so it is not made"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([document("x", "/a"), document("x", "/b"), document(None, "x")], "documents[0] is called 'x' already"),
        ([document(None, "/a"), document(None, "/b")], "documents[1]: has no `name`, as documents[0] has none"),
        ([document("x", "x"), document(None, "x")], "in a circle, so none can be the first: 'x' → 'x'"),
        ([document("x", "z"), document("y", "x"), document("z", "y"), document(None, "z")], "'x' → 'z' → 'y' → 'x'"),
        ([document("x", "x", "/a")], "in a circle"),
        ([document("s3://b/x", "/a"), document(None, "/b")], "documents[0].name: 's3://b/x' could be a place"),
        ([document("/abs", "/a"), document(None, "/b")], "could be a place"),
        ([document("x+y", "/a"), document(None, "/b")], "or a model with an adapter"),
        ([document("../up", "/a"), document(None, "/b")], "could be a place"),
        (document("~/x", "/a"), "name: '~/x' could be a place"),
        ([document("x", "/a") | {"dtyp": "float32"}, document(None, "x")], "documents[0].dtyp: is not a key"),
        ([document("x", "/a"), None], "documents[1].the recipe must be a mapping"),
        ({"documents": [document("x", "/a")], "dtype": "float32"}, "dtype: is not a key beside `documents`"),
        ({"documents": "x"}, "documents: is a list of recipes"),
        ([], "the recipe is empty"),
        ([document(f"m{n}", "/a") for n in range(MAX_DOCUMENTS + 1)], f"more than the {MAX_DOCUMENTS} that are read"),
        ([{"documents": []}, document(None, "/a")], "documents[0].documents: there are several here"),
        ([{"wrong": n} for n in range(MAX_DOCUMENTS)], "documents[4].wrong: is not a key"),
        ([document("x", "/a+/l", **ADAPTER), document(None, "x")], "documents[0].output_kind: is for the document"),
        ([document("x", "/a"), document(None, "/a", **(ADAPTER | {"base_model": "x"}))],
         "documents[1].base_model: 'x' is gone once"),
        ([document("x", "/a"), FISHER], "documents[1]: statistics are read from where they are, and 'x' is"),
        ([document(f"m{n}", *(f"/{n}/{m}" for m in range(60))) for n in range(4)]
         + [document(None, *(f"m{n}" for n in range(4)), *(f"/{n}" for n in range(17)))],
         f"models: 257 places in all, adapters and checkpoints of statistics among them, more than the {MAX_PLACES}"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_in_words(value: Any, says: str) -> None:
    assert any(says in problem for problem in problems(value)), problems(value)


def test_as_many_places_as_are_read_may_be_named_and_documents_that_are_not_run_count_for_nothing() -> None:
    used = [document(f"m{n}", *(f"/{n}/{m}" for m in range(60))) for n in range(4)]
    last = document(None, *(f"m{n}" for n in range(4)), *(f"/{n}" for n in range(16)))
    spare = document("spare", "/more+/lora", **ADAPTER)
    assert len(parse_documents([*used, spare, last]).places) == MAX_PLACES == 256


def test_an_adapter_may_be_made_of_other_documents() -> None:
    graph = parse_documents([document("x", "/a", "/b"), document(None, "x", rank=8, **ADAPTER)])
    assert graph.output.output_kind == "adapter"


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_order_is_one_that_can_be_run_and_the_same_however_it_is_written(
    count: int, chance: random.Random
) -> None:
    names = [f"m{number}" for number in range(count)]
    written = []
    for number, name in enumerate(names):
        used = [each for each in names[:number] if chance.random() < 0.4]
        written.append(document(None if number == count - 1 else name, "/a", *used))
    found = order(parse_documents(written))
    done: set[str] = set()
    needed: set[str | None] = {None}
    for each in reversed(found):
        own = written[names.index(each) if each else count - 1]
        assert each in needed
        needed |= {entry["model"] for entry in own["models"]} - {"/a"}
    for each in found:
        own = written[names.index(each) if each else count - 1]
        assert {entry["model"] for entry in own["models"]} - {"/a"} <= done
        done.add(str(each))
    assert found[-1] is None
    assert needed == set(found)
    chance.shuffle(written)
    assert order(parse_documents(written)) == found


def test_the_command_line_leaves_names_of_merges_and_makes_uris_of_directories(tmp_path: Any) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "model").mkdir()
    text = yaml.safe_dump_all([document("first", "model"), document(None, "first", "./model")])
    place = (tmp_path / "model").as_uri()
    wanted = [document("first", place), document(None, "first", place)]
    assert localise(read(text), tmp_path) == {"documents": wanted}
    assert as_mapping(wanted) == {"documents": wanted}
    with pytest.raises(RecipeError, match=r"documents\[0\]\.models\[0\]\.model: \./gone"):
        localise({"documents": [document("first", "./gone")]}, tmp_path)


def test_the_command_line_leaves_names_of_merges_under_adapters(tmp_path: Any) -> None:
    for name in ("first", "lora", "base"):
        (tmp_path / name).mkdir()
    lora, base = ((tmp_path / name).as_uri() for name in ("lora", "base"))
    last = document(None, "first+./lora", "base", buffers="first+./lora", chat_template="first+./lora")
    wanted = document(None, f"first+{lora}", base, buffers=f"first+{lora}", chat_template=f"first+{lora}")
    first = document("first", base)
    assert localise({"documents": [first, last]}, tmp_path) == {"documents": [first, wanted]}
    assert parse_documents([first, wanted]).adapters == [lora]


def test_a_template_may_be_that_of_a_model_whose_adapter_has_a_key_of_its_own(tmp_path: Any) -> None:
    for name in ("lora", "base"):
        (tmp_path / name).mkdir()
    lora, base = ((tmp_path / name).as_uri() for name in ("lora", "base"))
    entry = {"model": "base", "adapter": "./lora", "parameters": {"weight": 1}}
    value = {"merge_method": "linear", "models": [entry], "chat_template": "base+./lora"}
    changed = localise(value, tmp_path)
    assert changed["chat_template"] == f"{base}+{lora}"
    assert parse_documents(changed).output.adapted == {f"{base}+{lora}": (base, lora)}
    for template in ("{{ a + b }}", "base+", "+".join("abc")):
        assert localise(value | {"chat_template": template}, tmp_path)["chat_template"] == template
