"""What is kept for how long, and whose an upload is."""

from __future__ import annotations

import pytest

from service.running.retention import PAUSES_S, SOONEST_S, Retention

pytestmark = pytest.mark.fast

DAY = 86400.0
KEPT = Retention(records_s=30 * DAY, uploads_s=DAY)
NOW = 1e9
SHARD = "model-00001-of-00002.safetensors"


def test_records_are_kept_as_long_as_was_set() -> None:
    assert KEPT.forget_before(NOW) == NOW - 30 * DAY
    assert Retention(0, DAY).forget_before(NOW) is None, "0 is for ever"


def test_what_has_just_ended_is_kept_whatever_was_set() -> None:
    hasty = Retention(1e-3, 1e-3)
    assert hasty.forget_before(NOW) == hasty.sweep_before(NOW) == NOW - SOONEST_S


@pytest.mark.parametrize(
    ("name", "age_s", "began_before_s", "abandoned"),
    [
        (SHARD, DAY + 1, None, True),
        (SHARD, DAY - 1, None, False),
        ("model.safetensors", DAY + 1, None, True),
        ("notes.txt", 99 * DAY, None, False),
        ("notes.txt", 10, 20, False),
        (SHARD, 10, 20, True),
        (SHARD, 20 + SOONEST_S / 2, 20, True),
        (SHARD, 20 + SOONEST_S + 1, 20, False),
    ],
)
def test_only_old_or_own_uploads_of_shards_are_abandoned(
    name: str, age_s: float, began_before_s: float | None, abandoned: bool
) -> None:
    left_since = None if began_before_s is None else NOW - began_before_s
    assert KEPT.is_abandoned(name, NOW - age_s, NOW, left_since) == abandoned


def test_a_store_that_fails_is_asked_less_and_less_often() -> None:
    assert Retention.pause_s(NOW, NOW) == PAUSES_S[0]
    assert Retention.pause_s(NOW - 1000, NOW) == 100
    assert Retention.pause_s(NOW - 99 * DAY, NOW) == PAUSES_S[1]
