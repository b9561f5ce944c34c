"""What ``import mergemill`` offers."""

from __future__ import annotations

import pytest

import mergemill
from workers import errors

pytestmark = pytest.mark.fast


def test_every_name_is_there() -> None:
    for name in mergemill.__all__:
        assert getattr(mergemill, name).__name__ == name
    with pytest.raises(AttributeError, match="Clint"):
        mergemill.Clint  # noqa: B018


def test_all_that_a_client_may_catch_is_one_tree() -> None:
    for name in mergemill._ERRORS:
        assert getattr(mergemill, name) is getattr(errors, name)
        assert issubclass(getattr(mergemill, name), mergemill.MergemillError)
