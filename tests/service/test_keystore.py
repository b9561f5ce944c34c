"""API keys in a real Valkey."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from service import keystore
from service.keys import Limits, Scope, new_key, split_token
from service.keystore import KeyStore
from workers.errors import JobStoreUnavailableError, KeyNotFoundError

pytestmark = pytest.mark.valkey


@pytest.fixture
def keys(valkey_url: str, valkey_namespace: str) -> Iterator[KeyStore]:
    with KeyStore(valkey_url, valkey_namespace) as store:
        yield store


def test_a_key_is_kept_without_its_secret(keys: KeyStore, raw: redis.Redis, valkey_namespace: str) -> None:
    made, token = new_key("a", [Scope.READ], 1000.0, inputs=["s3://b/x"], limits={"running_jobs": 3})
    keys.create(made)
    assert keys.get(made.id) == made
    assert keys.get("0" * 12) is None
    _, secret = split_token(token) or ("", "")
    kept = {key: raw.dump(key) for key in raw.keys(f"{valkey_namespace}:*")}
    assert set(kept) == {f"{valkey_namespace}:keys", f"{valkey_namespace}:key:{made.id}"}
    assert raw.hget(f"{valkey_namespace}:key:{made.id}", "running_jobs") == "3"
    assert secret not in repr(raw.hgetall(f"{valkey_namespace}:key:{made.id}"))
    for key in kept:
        assert f"``{key.removeprefix(valkey_namespace + ':').replace(made.id, '<id>')}``" in (
            keystore.__doc__ or ""
        )


def test_revoking_is_for_good_and_keeps_the_first_time(keys: KeyStore) -> None:
    made, _ = new_key("a", [Scope.READ], 1000.0)
    keys.create(made)
    assert keys.any_usable(1001.0)
    keys.revoke(made.id, 1002.0)
    keys.revoke(made.id, 1003.0)
    found = keys.get(made.id)
    assert found is not None
    assert found.revoked_at == 1002.0
    assert not keys.any_usable(1001.0)
    with pytest.raises(KeyNotFoundError):
        keys.revoke("0" * 12, 1.0)
    assert keys.get("0" * 12) is None


def test_a_list_is_the_oldest_first_and_an_expired_key_opens_nothing(keys: KeyStore) -> None:
    assert keys.list() == []
    made = [new_key(f"{age}", [Scope.READ], 1000.0 - age, lasts_s=5)[0] for age in (1, 3, 2)]
    for each in made:
        keys.create(each)
    assert [key.name for key in keys.list()] == ["3", "2", "1"]
    assert keys.any_usable(1003.9)
    assert not keys.any_usable(1004.0)


def test_requests_are_counted(keys: KeyStore, raw: redis.Redis, valkey_namespace: str) -> None:
    made, _ = new_key("a", [Scope.READ], 1000.0)
    keys.create(made)
    slow = Limits(requests_per_second=0.01)  # a burst of one, and a hundred seconds for the next
    first, second = keys.admit(made.id, slow), keys.admit(made.id, slow)
    assert (first.admitted, first.limit, first.remaining) == (True, 1, 0)
    assert (second.admitted, second.remaining) == (False, 0)
    assert 95 < second.retry_s <= 100
    assert 95 < second.reset_s <= 100
    rate = f"{valkey_namespace}:key:{made.id}:rate"
    assert 90_000 < int(raw.pttl(rate)) <= 101_100  # nothing is left of it once it is full
    raw.hset(rate, "at", str(time.time() - 300))
    assert keys.admit(made.id, slow).admitted
    raw.hset(
        rate, "at", str(time.time() + 300)
    )  # a clock that was set back takes nothing away, nor gives any
    assert not keys.admit(made.id, slow).admitted


def test_a_burst_is_two_seconds_worth_and_then_the_rate_holds(keys: KeyStore) -> None:
    made, _ = new_key("a", [Scope.READ], 1000.0)
    keys.create(made)
    limits = Limits(requests_per_second=20)
    begun = time.monotonic()
    admitted = sum(keys.admit(made.id, limits).admitted for _ in range(60))
    most = 40 + 20 * (time.monotonic() - begun) + 1
    assert 40 <= admitted <= most
    unlimited = keys.admit(made.id, Limits(requests_per_second=0))
    assert (unlimited.admitted, unlimited.limit) == (True, 0)


def test_the_time_of_use_is_written_once_a_minute(
    keys: KeyStore, raw: redis.Redis, valkey_namespace: str
) -> None:
    made, _ = new_key("a", [Scope.READ], 1000.0)
    keys.create(made)
    name = f"{valkey_namespace}:key:{made.id}"
    keys.admit(made.id, Limits())
    used = float(raw.hget(name, "used_at") or 0)
    assert abs(used - time.time()) < 10
    raw.hset(name, "used_at", str(used - 59))
    keys.admit(made.id, Limits())
    assert float(raw.hget(name, "used_at") or 0) in {used - 59, *(used + n for n in range(1, 10))}
    raw.hset(name, "used_at", str(used - 61))
    keys.admit(made.id, Limits())
    assert float(raw.hget(name, "used_at") or 0) >= used
    found = keys.get(made.id)
    assert found is not None
    assert found.used_at == float(raw.hget(name, "used_at") or 0)
    keys.admit("0" * 12, Limits())
    assert keys.get("0" * 12) is None  # a key that there is none of does not come to be by being used


def test_no_redis(valkey_namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keystore.CONNECTION_TRIES", 0)
    made, _ = new_key("a", [Scope.READ], 1000.0)
    with KeyStore("redis://127.0.0.1:1", valkey_namespace) as keys:
        for act in (
            lambda: keys.create(made),
            lambda: keys.get(made.id),
            keys.list,
            lambda: keys.revoke(made.id, 1.0),
            lambda: keys.admit(made.id, Limits()),
        ):
            with pytest.raises(JobStoreUnavailableError):
                act()
