"""Recipes on the command line: what is a path here, and what is somebody else's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergemill.recipes import hub_name_hint, local_uri, localise, output_uri, read
from workers.errors import RecipeError

pytestmark = pytest.mark.fast


@pytest.fixture
def here(tmp_path: Path) -> Path:
    place = tmp_path / "my place"
    for name in ("base", "org/tuned", "a#b"):
        (place / name).mkdir(parents=True)
    (place / "file").touch()
    return place


def test_directories_become_uris_and_other_names_stay(here: Path) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "./base", "parameters": {"weight": 1}},
            {"model": "org/tuned"},
            {"model": "org/elsewhere@v1"},
            {"model": "s3://bucket/x"},
            {"model": str(here / "a#b")},
        ],
        "tokenizer_source": "org/tuned",
        "tokenizer": {
            "source": "base",
            "tokens": {
                "<a>": {"source": "org/tuned"},
                "<b>": {"source": {"kind": "zero"}},
                "<c>": {
                    "source": {"kind": "model_token", "model": "org/tuned", "token": "base"},
                    "force": True,
                },
            },
        },
        "chat_template": "org/tuned",
        "buffers": "base",
    }
    before = repr(recipe)
    found = localise(recipe, here)
    assert repr(recipe) == before
    assert found == {
        "merge_method": "ties",
        "base_model": (here / "base").as_uri(),
        "models": [
            {"model": (here / "base").as_uri(), "parameters": {"weight": 1}},
            {"model": (here / "org/tuned").as_uri()},
            {"model": "org/elsewhere@v1"},
            {"model": "s3://bucket/x"},
            {"model": (here / "a#b").as_uri()},
        ],
        "tokenizer_source": (here / "org/tuned").as_uri(),
        "tokenizer": {
            "source": "base",
            "tokens": {
                "<a>": {"source": (here / "org/tuned").as_uri()},
                "<b>": {"source": {"kind": "zero"}},
                "<c>": {
                    "source": {
                        "kind": "model_token",
                        "model": (here / "org/tuned").as_uri(),
                        "token": "base",
                    },
                    "force": True,
                },
            },
        },
        "chat_template": (here / "org/tuned").as_uri(),
        "buffers": (here / "base").as_uri(),
    }
    assert "%20" in found["base_model"]


def test_of_a_model_with_an_adapter_both_are_found(here: Path) -> None:
    (here / "c+d").mkdir()
    base, tuned = ((here / name).as_uri() for name in ("base", "org/tuned"))
    written = {
        "base+org/tuned": f"{base}+{tuned}",
        "./base+org/elsewhere": f"{base}+org/elsewhere",
        "org/elsewhere@v1+./base": f"org/elsewhere@v1+{base}",
        "s3://bucket/x+s3://bucket/y": "s3://bucket/x+s3://bucket/y",
        "c+d": (here / "c+d").as_uri(),
        "a+b+c": "a+b+c",
    }
    recipe = {"models": [{"model": name} for name in written] + [{"model": "base", "adapter": "org/tuned"}]}
    found = localise(recipe, here)["models"]
    assert [entry["model"] for entry in found] == [*written.values(), base]
    assert found[-1]["adapter"] == tuned
    with pytest.raises(RecipeError, match="no directory"):
        localise({"models": [{"model": "base+./nowhere"}]}, here)


def test_models_are_found_wherever_a_recipe_names_them(here: Path) -> None:
    slices: list[dict[str, object]] = [
        {"sources": [{"model": "base", "layer_range": [0, 1]}], "base_model": "base"}
    ]
    recipe: dict[str, object] = {
        "slices": slices,
        "modules": {"x": {"models": [{"model": "base"}]}, "y": {"slices": slices}, "z": 3},
    }
    at = (here / "base").as_uri()
    placed = [{"sources": [{"model": at, "layer_range": [0, 1]}], "base_model": at}]
    assert localise(recipe, here) == {
        "slices": placed,
        "modules": {"x": {"models": [{"model": at}]}, "y": {"slices": placed}, "z": 3},
    }
    slices[0]["base_model"] = "./none"
    with pytest.raises(RecipeError, match=r"modules\.y\.slices\[0\]\.base_model: \./none: no model here"):
        localise(recipe, here)


def test_the_word_base_means_the_base_even_where_a_directory_is_called_so(here: Path) -> None:
    assert localise({"tokenizer_source": "base"}, here) == {"tokenizer_source": "base"}


def test_all_paths_that_lead_nowhere_are_named_at_once(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        localise(
            {"base_model": "./none", "models": [{"model": "base"}, {"model": "/no/where"}, {"model": "~/?"}]},
            here,
        )
    first, *others = caught.value.problems
    assert first == f"base_model: ./none: no model here: there is no directory {here / 'none'}"
    assert [problem.partition(":")[0] for problem in others] == ["models[1].model", "models[2].model"]


@pytest.mark.parametrize("name", ["base/none", "none", "file", "org/none"])
def test_what_may_be_a_hub_name_is_left_to_the_service(here: Path, name: str) -> None:
    assert local_uri(name, here) == name


@pytest.mark.parametrize(
    "recipe", [{"models": "x"}, {"models": [1, {"a": 2}, {"model": 3}]}, {"base_model": 5}, {}]
)
def test_what_is_wrong_otherwise_is_left_to_the_service(here: Path, recipe: dict[str, object]) -> None:
    assert localise(recipe, here) == recipe


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://b/x/", "s3://b/x/"),
        ("file:///x", "file:///x"),
        ("new/../out", "{here}/out"),
        ("/abs x", "file:///abs%20x"),
    ],
)
def test_outputs_need_not_exist(here: Path, name: str, expected: str) -> None:
    assert output_uri(name, here) == expected.format(here=here.as_uri())


def test_the_hint_names_what_the_service_did_not_know(here: Path) -> None:
    recipe = {"base_model": "org/one", "models": [{"model": "org/two"}, {"model": "s3://b/x"}]}
    assert hub_name_hint(recipe, ["'org/two' is a hub name that nobody knows"], here) == (
        f"there is no directory 'org/two' in {here} either"
    )
    assert hub_name_hint(recipe, ["density is out of range"], here) is None
    assert hub_name_hint({"models": None}, ["'x'"], here) is None


def test_yaml_is_read_safely() -> None:
    assert read("models: [{model: a}]") == {"models": [{"model": "a"}]}
    assert read('{"models": []}') == {"models": []}
    assert read("a: 1\n---\nb: 2\n---\n") == {"documents": [{"a": 1}, {"b": 2}]}
    for text in ("!!python/object/apply:os.system [true]", "- a", "", "\0", "&a [*a"):
        with pytest.raises(RecipeError):
            read(text)
