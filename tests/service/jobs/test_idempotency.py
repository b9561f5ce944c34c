"""Idempotency keys: which can be one, and which requests are the same."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs.idempotency import MAX_KEY_CHARS, once, read_key
from workers.errors import IdempotencyKeyError

pytestmark = pytest.mark.fast

quick = settings(max_examples=50, deadline=None)

UUID = "8e03978e-40d5-43e8-bc93-6894a57f9324"
ASKED: dict[str, Any] = {
    "method": "POST",
    "path": "/v1/merges",
    "query": [("a", "1"), ("b", "2")],
    "body": {"recipe": {"merge_method": "linear", "seed": 1}, "output": "s3://b/o"},
    "ttl_s": 60.0,
    "owner": "alice",
}


def fingerprint(**changes: Any) -> str:
    return once("key", **{**ASKED, **changes}).fingerprint


class TestKeys:
    def test_none(self) -> None:
        assert read_key([]) is None

    @pytest.mark.parametrize("text", [UUID, f'"{UUID}"', f"  {UUID}\t"])
    def test_quoted_or_bare_it_is_the_same(self, text: str) -> None:
        assert read_key([text]) == UUID

    def test_escapes_of_a_quoted_key(self) -> None:
        assert read_key([r'"a\"b\\c"']) == r'a"b\c'

    @pytest.mark.parametrize("text", ['"a', r"a\"", '"a"b"'])
    def test_what_is_not_a_quoted_string_is_a_bare_key(self, text: str) -> None:
        assert read_key([text]) == text

    @pytest.mark.parametrize(
        "headers",
        [[""], [" "], ['""'], ['" "'], ["a b"], ['"a b"'], ["é"], ["a\x00"], ["a\x7f"], ["a", "a"], ["a, b"]],
    )
    def test_what_can_be_no_key(self, headers: list[str]) -> None:
        with pytest.raises(IdempotencyKeyError):
            read_key(headers)

    def test_its_length_has_a_bound(self) -> None:
        assert read_key(["x" * MAX_KEY_CHARS]) == "x" * 255
        assert read_key([f'"{"x" * MAX_KEY_CHARS}"']) == "x" * 255
        with pytest.raises(IdempotencyKeyError, match="255"):
            read_key(["x" * (MAX_KEY_CHARS + 1)])

    @quick
    @given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255))
    def test_every_visible_text_is_a_key_once_it_is_quoted(self, key: str) -> None:
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        assert read_key([f'"{escaped}"']) == key


class TestRequests:
    @quick
    @given(
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), min_size=1), st.randoms()
    )
    def test_order_does_not_matter(self, body: dict[str, Any], chance: random.Random) -> None:
        items = list(body.items())
        chance.shuffle(items)
        assert fingerprint(body=body) == fingerprint(body=dict(items), query=[("b", "2"), ("a", "1")])

    @pytest.mark.parametrize(
        "change",
        [
            {"method": "PUT"},
            {"path": "/v1/plans"},
            {"query": [("a", "1")]},
            {"query": [("a", "1"), ("b", "2"), ("b", "2")]},
            {"query": [("a", "12"), ("b", "")]},
            {"body": {**ASKED["body"], "output": "s3://b/p"}},
            {"body": {"recipe": {"merge_method": "linear", "seed": "1"}, "output": "s3://b/o"}},
            {"body": {"recipe": {"merge_method": "linear", "seed": 1.5}, "output": "s3://b/o"}},
            {"owner": "bob"},
        ],
    )
    def test_everything_that_is_asked_for_does(self, change: dict[str, Any]) -> None:
        assert fingerprint(**change) != fingerprint()

    def test_callers_keys_are_their_own(self) -> None:
        assert once("key", **ASKED).key != once("key", **{**ASKED, "owner": "bob"}).key
        assert once("ey", **{**ASKED, "owner": "k"}).key != once("key", **{**ASKED, "owner": ""}).key

    def test_what_is_stored_shows_nothing(self) -> None:
        stored = json.dumps([*vars_of(once("a-secret-key", **ASKED))])
        assert "a-secret-key" not in stored and "s3://" not in stored


def vars_of(value: Any) -> list[Any]:
    return [getattr(value, name) for name in value.__slots__]
