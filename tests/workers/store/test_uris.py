"""URIs as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import StoreError
from workers.store import from_path, join, name, normalise, parent, scheme, to_path
from workers.store.uris import split_s3

pytestmark = pytest.mark.fast

SEGMENTS = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: text not in (".", "..")
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("given_uri", "normal"),
    [
        ("s3://bucket//a///b/", "s3://bucket/a/b"),
        ("s3://bucket/./a/.", "s3://bucket/a"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://Bucket/Key", "s3://Bucket/Key"),
        ("s3://bucket/a%20b?c#d", "s3://bucket/a%20b?c#d"),
        ("file:///a//b/", "file:///a/b"),
        ("file://localhost/a", "file:///a"),
        ("FILE:///a", "file:///a"),
        ("file:///a b", "file:///a%20b"),
        ("file:///a%2fb", "file:///a/b"),
        ("file:///%C3%BC", "file:///%C3%BC"),
        ("/a/./b c/", "file:///a/b%20c"),
        ("/a%20b", "file:///a%2520b"),
        ("/", "file:///"),
        ("file:///", "file:///"),
    ],
)
def test_normalise(given_uri: str, normal: str) -> None:
    assert normalise(given_uri) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gs://bucket/a", r"supported are s3://bucket/key and file:///path"),
        ("https://host/a", "supported are"),
        ("relative/path", "supported are"),
        ("", "supported are"),
        ("s3:///key", "no bucket"),
        ("s3://bucket/a/../b", r"'\.\.'"),
        ("file:///a/../b", r"'\.\.'"),
        ("file:///a/%2e%2e/b", r"'\.\.'"),
        ("file:///a/..%2fb", r"'\.\.'"),
        ("/a/..", r"'\.\."),
        ("file://host/a", "host 'host'"),
        ("file://relative", "host 'relative'"),
        ("file://", "no path"),
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file:///a%00b", "NUL"),
        ("file:///a\ud800", "half a character"),
        ("/a\ud800", "half a character"),
        ("s3://bucket/\udcff", "half a character"),
    ],
)
def test_what_is_refused(uri: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        normalise(uri)


@given(SEGMENTS)
def test_file_uris_are_those_of_pathlib(segments: list[str]) -> None:
    path = "/" + "/".join(segments)
    assert from_path(path) == Path(path).as_uri()
    assert to_path(from_path(path)) == path
    assert normalise(from_path(path)) == from_path(path)


@given(SEGMENTS, st.sampled_from(["s3://bucket", "file:///root dir"]))
def test_join_name_and_parent_agree(segments: list[str], root: str) -> None:
    joined = join(root, *segments)
    assert name(joined) == segments[-1]
    assert parent(joined) == join(root, *segments[:-1])
    assert normalise(joined) == joined
    assert join(root, "/".join(segments)) == joined


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "file:///", "/"])
def test_roots_have_no_parent(uri: str) -> None:
    with pytest.raises(StoreError, match="nothing above"):
        parent(uri)
    assert name(uri) == ""


def test_parent_of_what_is_at_the_root() -> None:
    assert parent("file:///a") == "file:///"
    assert parent("s3://bucket/a") == "s3://bucket"


def test_join_refuses_to_climb() -> None:
    for uri in ("s3://bucket/a", "file:///a"):
        with pytest.raises(StoreError):
            join(uri, "..", "b")


def test_scheme() -> None:
    assert [scheme(uri) for uri in ("s3://b/k", "FILE:///x")] == ["s3", "file"]


@pytest.mark.parametrize(
    "bucket",
    ["host:9000", "user@host", "arn:aws:s3:us-east-1:123456789012:accesspoint:mine", "a b", "a?b", "a#b", "a%2fb",
     "a\\b", "..", ".hidden", "-x", "bücket", "a\n", "a\0", "x" * 256, "[::1]"],
)  # fmt: skip
def test_a_bucket_is_a_name_and_no_address(bucket: str) -> None:
    for place in (normalise, split_s3):
        with pytest.raises(StoreError, match="is no name of a bucket"):
            place(f"s3://{bucket}/key")
