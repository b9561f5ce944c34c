"""API keys by themselves: tokens, secrets, and which places lie in which prefixes."""

from __future__ import annotations

import hashlib
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.keys import (
    ANYBODY,
    EVERYWHERE,
    HUB,
    ApiKey,
    Limits,
    Scope,
    is_secret_of,
    lies_in,
    new_key,
    split_token,
)
from workers.errors import StoreError
from workers.store.uris import normalise, to_path

pytestmark = pytest.mark.fast


def key(**more: object) -> ApiKey:
    return new_key("somebody", [Scope.READ], 1000.0, **more)[0]  # type: ignore[arg-type]


def test_a_token_is_an_id_and_a_secret_of_which_only_the_digest_is_kept() -> None:
    made, token = new_key("somebody", [Scope.SUBMIT, Scope.READ, Scope.READ], 1000.0, lasts_s=60)
    found = split_token(token)
    assert found is not None
    assert re.fullmatch(r"mm_[0-9a-z]{12}_[0-9a-f]{64}", token)
    assert found[0] == made.id
    assert made.digest == hashlib.sha256(found[1].encode()).hexdigest()
    assert found[1] not in made.model_dump_json() + repr(made)
    assert made.digest not in repr(made)
    assert made.scopes == (Scope.READ, Scope.SUBMIT)
    assert made.expires_at == 1060
    assert ApiKey.model_validate_json(made.model_dump_json()) == made
    assert new_key("somebody", [Scope.READ], 1000.0)[1] != token


def test_only_its_own_secret_is_a_keys() -> None:
    made, token = new_key("somebody", [Scope.READ], 1000.0)
    _, secret = split_token(token) or ("", "")
    assert is_secret_of(secret, made)
    for wrong in ("", secret[:-1], secret.upper() + "0", "0" * 64, made.digest):
        assert not is_secret_of(wrong, made)
    assert not is_secret_of(secret, None)
    assert not is_secret_of(secret, new_key("other", [Scope.READ], 1000.0)[0])
    # what stands in for the digest of no key is a digest that no secret is known for
    assert not is_secret_of("0" * 64, None)
    assert not is_secret_of("", ANYBODY)


@pytest.mark.parametrize(
    "token",
    ["", "mm_", "mm__", "mm_0000000000il_" + "0" * 64, "mm_000000000000_" + "0" * 63, "mm_000000000000_" + "G" * 64,
     "mm_000000000000_" + "0" * 65, "xx_000000000000_" + "0" * 64, " mm_000000000000_" + "0" * 64,
     "mm_000000000000_" + "0" * 64 + "\n", "mm_00000000000٣_" + "0" * 64],
)  # fmt: skip
def test_what_is_no_token(token: str) -> None:
    assert split_token(token) is None


@given(st.text(max_size=100))
def test_any_text_is_a_token_or_not(text: str) -> None:
    found = split_token(text)
    assert found is None or text == f"mm_{found[0]}_{found[1]}"


def test_scopes_and_ends() -> None:
    reader = key(lasts_s=60)
    assert (reader.allows(Scope.READ), reader.allows(Scope.SUBMIT), reader.is_admin) == (True, False, False)
    assert (reader.ended(1059.9), reader.ended(1060.0)) == (None, "has expired")
    revoked = reader.model_copy(update={"revoked_at": 1.0})
    assert revoked.ended(0.0) == "was revoked"
    admin, _ = new_key("admin", [Scope.ADMIN], 0)
    assert all(admin.allows(scope) for scope in Scope)


def test_limits() -> None:
    service = Limits(queued_jobs=5)
    assert service.with_own({}) == service
    assert service.with_own({"input_bytes": 7}) == Limits(queued_jobs=5, input_bytes=7)
    assert key(limits={"queued_jobs": 0}).limits == {"queued_jobs": 0}
    for wrong in (
        {"queued": 1},
        {"queued_jobs": -1},
        {"queued_jobs": 1.5},
        {"requests_per_second": math.inf},
    ):
        with pytest.raises(ValidationError):
            key(limits=wrong)


def test_prefixes_are_normalised() -> None:
    made = key(
        inputs=[
            "S3://bucket//team/",
            "/models/./a b",
            "file://localhost/x%2fy",
            HUB,
            EVERYWHERE,
            "s3://bucket/team",
        ]
    )
    expected = ("s3://bucket/team", "file:///models/a%20b", "file:///x/y", HUB, EVERYWHERE)
    assert made.inputs == expected


@pytest.mark.parametrize(
    "prefix", ["", "team", "s3://", "s3:///team", "s3://bucket/../x", "gs://bucket", "s3://bucket/team*", "file://host/x",
               "file:///a/%2e%2e/b", "hub:org/", "**", "file:///a%00b"]
)  # fmt: skip
def test_prefixes_that_are_none(prefix: str) -> None:
    with pytest.raises(ValidationError):
        key(inputs=[prefix])
    with pytest.raises(ValidationError):
        key(outputs=[prefix])


def test_hub_names_are_nothing_to_write() -> None:
    with pytest.raises(ValidationError):
        key(outputs=[HUB])


TEAM = "s3://bucket/team"
MODELS = "file:///models/team%20a"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (TEAM, True),
        (f"{TEAM}/", True),
        (f"{TEAM}/x", True),
        (f"{TEAM}//x/./y", True),
        ("S3://bucket/team/x", True),
        (f"{TEAM}2", False),
        (f"{TEAM}2/x", False),
        (f"{TEAM}@main", False),
        (f"{TEAM}/../x", False),
        (f"{TEAM}/../team/x", False),
        (f"{TEAM}/..", False),
        ("s3://bucket/te%61m/x", False),  # an S3 key is what it says
        ("s3://bucket/team%2fx", False),
        ("s3://bucket/Team/x", False),
        ("s3://Bucket/team/x", False),
        ("s3://bucket", False),
        ("s3://bucket/", False),
        ("s3://bucket2/team/x", False),
        ("s3://other/bucket/team/x", False),
        ("s3://bucket@evil/team/x", False),
        ("s3:/bucket/team/x", False),
        ("s3://bucket\\team/x", False),
        ("s3://bucket/team\\..\\x", False),
        ("s3://bucket/team\0/x", False),
        (f" {TEAM}/x", False),
        ("s3:///bucket/team/x", False),
        ("file:///models/team a/x", True),
        ("/models/team a/x", True),
        ("FILE://LOCALHOST/models/%74eam%20a", True),
        ("file:///models%2Fteam%20a%2fx", True),
        ("file:///models//team%20a/./x", True),
        ("file:///models/team%20a/%2e%2e/b", False),
        ("file:///models/team%20a/..%2fb", False),
        ("file:///models/team%20ab", False),
        ("file:///models/team%2520a/x", False),
        ("file:///models/Team%20a/x", False),
        ("file://elsewhere/models/team%20a/x", False),
        ("file:///models/team%20a?x", False),
        ("models/team a/x", False),
        ("", False),
        ("*", False),
        (HUB, False),
        (f"{TEAM}/\udcff", False),
        ("file:///models/team%20a/\ud800", False),
    ],
)
def test_what_lies_in_a_prefix(uri: str, expected: bool) -> None:
    assert lies_in(uri, [TEAM, MODELS]) is expected
    assert not lies_in(uri, [])
    assert not lies_in(uri, [HUB])


def test_everything_lies_everywhere_but_what_is_no_place() -> None:
    assert lies_in("s3://a/b", [EVERYWHERE])
    assert lies_in("file:///", ["file:///"])
    assert lies_in("file:///x", ["file:///"])
    assert lies_in("s3://bucket/x", ["s3://bucket"])
    assert not lies_in("s3://bucket/../x", [EVERYWHERE])
    assert not lies_in("gs://a/b", [EVERYWHERE])


PIECES = (
    "team", "team2", "tea", "m", "..", ".", "/", "//", "%2e%2e", "%2f", "%2F", "%", "%00", "\\", "\0", "?", "#", "@",
    ":", "*", "Team", "\u2024\u2024", "\uff0e\uff0e", " ", "é", "e\u0301", "\udcff", "\ud800",
)  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(
    st.sampled_from(["s3://bucket/", "s3://bucket/team", "s3://bucket/team/", "S3://bucket/team/", "s3://"]),
    HOSTILE,
)
def test_no_s3_uri_gets_out_of_its_prefix(start: str, tail: str) -> None:
    """Judged by the bucket and the key that the store would be asked for."""
    uri = start + tail
    if lies_in(uri, [TEAM]):
        bucket, _, name = normalise(uri).removeprefix("s3://").partition("/")
        assert bucket == "bucket"
        assert name == "team" or name.startswith("team/")
        assert not {"..", "."} & set(name.split("/"))


@given(
    st.sampled_from(
        ["file:///models/", "file:///models/team", "/models/team/", "file://localhost/models/team/"]
    ),
    HOSTILE,
)
def test_no_file_uri_gets_out_of_its_prefix(start: str, tail: str) -> None:
    """Judged by the path that the operating system would be asked for."""
    uri = start + tail
    if lies_in(uri, ["file:///models/team"]):
        path = to_path(normalise(uri))
        assert path == "/models/team" or path.startswith("/models/team/")
        assert ".." not in path.split("/")


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4), st.lists(st.text(max_size=6), max_size=3))
def test_a_place_lies_in_itself_and_in_all_above_it(above: list[str], below: list[str]) -> None:
    uri = "s3://bucket/" + "/".join([*above, *below])
    try:
        prefix = normalise("s3://bucket/" + "/".join(above))
        whole = normalise(uri)
    except StoreError:
        assert not lies_in(uri, ["s3://bucket"])
        return
    assert lies_in(uri, [prefix])
    assert lies_in(whole, [whole])
    assert not lies_in(f"{prefix}x", [prefix])
    assert not lies_in("s3://bucket2/" + "/".join([*above, *below]), [prefix])
