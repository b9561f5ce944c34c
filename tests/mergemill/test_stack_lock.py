"""Who has a state directory: one stack, which says where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergemill.stack_lock import StackLock
from workers.errors import StackError

pytestmark = pytest.mark.fast


def test_the_second_is_told_where_the_first_is(tmp_path: Path) -> None:
    first = StackLock(tmp_path)
    with pytest.raises(StackError, match=f"already running in {tmp_path}: start another"):
        StackLock(tmp_path)
    first.tell("http://127.0.0.1:8080")
    with pytest.raises(
        StackError, match=r"at http://127\.0\.0\.1:8080: .*export MERGEMILL_URL=.*--state-dir"
    ):
        StackLock(tmp_path)
    first.release()
    first.release()
    second = StackLock(tmp_path)  # what the first had said is not said of the second
    with pytest.raises(StackError, match=f"already running in {tmp_path}: start another"):
        StackLock(tmp_path)
    second.release()
