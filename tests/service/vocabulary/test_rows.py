"""Rows in another order: every permutation comes out as it went in, however the vocabulary is made up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.checkpoint import StoredTensor
from service.vocabulary.building import missing_tokens, numbered
from service.vocabulary.filling import Voice, _ranges, fill
from service.vocabulary.reading import Tokenizer
from service.vocabulary.rows import Vocabulary, seen_through
from workers.sources import Gathered, Source, TensorRef

pytestmark = pytest.mark.fast

WIDTH = 4
WORDS = st.lists(st.sampled_from("abcdefghijklmnop"), unique=True, min_size=2, max_size=12)


def stored(uri: str, rows: int, dtype: str = "F32", width: int = WIDTH) -> StoredTensor:
    ref = TensorRef(
        f"{uri}/model.safetensors", "e", 800, 800 + rows * width * (4 if dtype == "F32" else 2), dtype
    )
    return StoredTensor("embedding", (rows, width), ref)


def made_of(source: Source, uris: Mapping[str, int]) -> list[list[tuple[int, int]]]:
    """For each row of a source which rows of which models it is made of: a reading of runs by another route."""
    if isinstance(source, TensorRef):
        width = 4 if source.dtype == "F32" else 2
        return [[(uris[source.uri], row)] for row in range(source.nbytes // WIDTH // width)]
    assert isinstance(source, Gathered)
    inner = [made_of(each, uris) for each in source.sources]
    return [
        [inner[number][first // WIDTH + row][0] for number, first in takes]
        for numel, takes in source.runs
        for row in range(numel // WIDTH)
    ]


def voice(uri: str, tokens: list[str], rows: int | None = None) -> Voice:
    numbers = {token: number for number, token in enumerate(tokens)}
    return Voice(uri, Tokenizer(uri, numbers, {}), len(tokens) if rows is None else rows)


@given(
    words=st.lists(WORDS, min_size=2, max_size=4),
    padding=st.none() | st.integers(1, 9),
    has_base=st.booleans(),
)
def test_every_model_keeps_each_of_its_tokens_and_lacks_none(
    words: list[list[str]], padding: int | None, has_base: bool
) -> None:
    voices = {f"/m{n}": voice(f"file:///m{n}", own) for n, own in enumerate(words)}
    first, *others = voices.values()
    new = missing_tokens(first.tokenizer, ((each.tokenizer, each.rows) for each in others), [])
    tokens = numbered(first.tokenizer, new)
    assert set(tokens) == {token for own in words for token in own}
    assert sorted(tokens.values()) == list(range(len(tokens)))
    vocabulary, problems = fill(tokens, padding, voices, "/m0" if has_base else None, "/m0", {})
    assert not problems
    assert vocabulary.size % (padding or 1) == 0
    assert len(tokens) <= vocabulary.size < len(tokens) + (padding or 1)
    tensors = {each.model: stored(each.model, each.rows) for each in voices.values()}
    places = {f"{each.model}/model.safetensors": number for number, each in enumerate(voices.values())}
    ranges = 0
    for number, each in enumerate(voices.values()):
        seen = seen_through(vocabulary, each.model, tensors)
        assert seen.shape == (vocabulary.size, WIDTH)
        rows = made_of(seen.source, places)
        assert len(rows) == vocabulary.size
        for token, row in tokens.items():
            holders = [(n, own.index(token)) for n, own in enumerate(words) if token in own]
            if token in words[number]:
                assert rows[row] == [(number, words[number].index(token))]  # the round trip
            elif has_base and token in words[0]:
                assert rows[row] == [(0, words[0].index(token))]
            else:
                assert rows[row] == holders
        assert all(not row for row in rows[len(tokens) :])
        runs = seen.source.runs if isinstance(seen.source, Gathered) else ()
        ranges += sum(max(1, len(run.takes)) for run in runs)
    assert ranges <= _ranges(vocabulary.own, first.model if has_base else None)


@given(order=st.permutations(range(9)))
def test_a_permutation_there_and_back_is_the_identity(order: list[int]) -> None:
    words = [f"t{number}" for number in range(9)]
    one, two = voice("file:///one", words), voice("file:///two", [words[number] for number in order])
    there, _ = fill(one.tokenizer.tokens, None, {"1": one, "2": two}, None, "1", {})
    back, _ = fill(two.tokenizer.tokens, None, {"1": one, "2": two}, None, "2", {})
    assert list(there.own["file:///two"][back.own["file:///one"]]) == list(range(9))
    same = stored("file:///one", 9)
    assert seen_through(there, "file:///one", {"file:///one": same}) is same


def test_runs_of_consecutive_rows_are_one_range() -> None:
    own = np.array([0, 1, 2, 7, 8, -1, -1, 3, -1])
    fills = {5: (("file:///b", 0),), 6: (("file:///b", 1),)}
    vocabulary = Vocabulary({}, 9, {"file:///a": own}, fills)
    tensors = {"file:///a": stored("file:///a", 9), "file:///b": stored("file:///b", 2)}
    seen = seen_through(vocabulary, "file:///a", tensors).source
    assert isinstance(seen, Gathered)
    assert [tuple(run) for run in seen.runs] == [
        (3 * WIDTH, ((0, 0),)), (2 * WIDTH, ((0, 7 * WIDTH),)), (2 * WIDTH, ((1, 0),)), (WIDTH, ((0, 3 * WIDTH),)),
        (WIDTH, ()),
    ]  # fmt: skip
    assert seen.dtype == "F32"


def test_a_tensor_with_fewer_rows_than_the_embedding_lacks_the_last() -> None:
    vocabulary = Vocabulary({}, 3, {"file:///a": np.array([0, 1, 2])}, {2: (("file:///b", 0),)})
    tensors = {"file:///a": stored("file:///a", 2), "file:///b": stored("file:///b", 2)}
    seen = seen_through(vocabulary, "file:///a", tensors).source
    assert isinstance(seen, Gathered)
    assert [tuple(run) for run in seen.runs] == [(2 * WIDTH, ((0, 0),)), (WIDTH, ((1, 0),))]


def test_a_token_that_one_model_has_and_another_added_is_an_added_one() -> None:
    entry = {"content": "b", "special": True, "lstrip": True}
    plain = Tokenizer("1", {"a": 0, "b": 1, "c": 2}, {})
    added = Tokenizer("2", {"a": 0, "d": 1, "b": 2}, {"b": entry})
    new = missing_tokens(Tokenizer("0", {"a": 0}, {}), [(plain, None), (added, None)], [])
    assert [one.token for one in new] == ["c", "d", "b"]
    assert new[-1].entry["special"] is True
    assert new[-1].entry["lstrip"] is True


def test_rows_of_another_width_are_not_taken() -> None:
    own = {"file:///a": np.array([0, -1])}
    vocabulary = Vocabulary({}, 2, own, {1: (("file:///b", 1),)})
    tensors = {"file:///a": stored("file:///a", 1), "file:///b": stored("file:///b", 2, width=8)}
    seen = seen_through(vocabulary, "file:///a", tensors).source
    assert isinstance(seen, Gathered)
    assert [run.takes for run in seen.runs] == [((0, 0),), ()]


@pytest.mark.parametrize(("dtypes", "takes", "expected"), [
    (("BF16", "BF16"), 1, "BF16"), (("BF16", "BF16"), 2, "F32"), (("BF16", "F32"), 1, "F32"),
])  # fmt: skip
def test_means_and_mixed_dtypes_are_float32_until_the_merge_is_rounded(
    dtypes: tuple[str, str], takes: int, expected: str
) -> None:
    givers = (("file:///b", 0), ("file:///a", 0))[:takes]
    vocabulary = Vocabulary({}, 2, {"file:///a": np.array([0, -1])}, {1: givers})
    tensors = {
        f"file:///{name}": stored(f"file:///{name}", 1, dtype)
        for name, dtype in zip("ab", dtypes, strict=True)
    }
    seen = seen_through(vocabulary, "file:///a", tensors)
    assert seen.source.dtype == expected
    assert seen.dtype == "BF16"  # what the output keeps
