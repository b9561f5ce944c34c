"""The job store and its server: the settings that it names, the errors that it gives, and the keys that it keeps."""

from __future__ import annotations

import functools
import time

import pytest
import redis

from service.jobs import jobstore, queuescripts, sweepscripts
from service.jobs.idempotency import once
from service.jobs.jobstore import JobStore
from service.jobs.sweepstore import SweepStore
from service.jobs.transitions import Failed, PlanningStarted
from tests.service.held_jobs import claimed
from tests.service.job_steps import ERROR, TO_RUNNING, fresh, part
from workers.errors import JobStoreUnavailableError

pytestmark = pytest.mark.valkey


def test_the_embedded_server_is_durable(job_store: JobStore) -> None:
    job_store.ping()
    assert job_store.durability_warnings() == ()


def test_each_careless_setting_is_named(job_store: JobStore, raw: redis.Redis) -> None:
    careless = {"appendonly": "no", "appendfsync": "everysec", "maxmemory-policy": "allkeys-lru"}
    good = {name: str(raw.config_get(name)[name]) for name in careless}
    try:
        for name, value in careless.items():
            raw.config_set(name, value)
            assert job_store.durability_warnings() == (f"Redis has {name} {value}, not {good[name]}",)
            raw.config_set(name, good[name])
    finally:
        for name, value in good.items():
            raw.config_set(name, value)


def test_a_redis_that_hides_its_settings_is_said_to(raw: redis.Redis, valkey_url: str) -> None:
    raw.acl_setuser("limited", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-config"])
    try:
        with JobStore(valkey_url.replace("//:", "//limited:").replace(password(valkey_url), "pw")) as store:
            (warning,) = store.durability_warnings()
    finally:
        raw.acl_deluser("limited")
    assert "does not tell" in warning
    assert "appendonly yes" in warning


def password(url: str) -> str:
    return url.partition("//:")[2].partition("@")[0]


def test_an_old_redis_is_named(job_store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.redis_connection.OLDEST_REDIS", (99, 1))
    (warning,) = job_store.durability_warnings()
    assert "is older than 99.1" in warning


def test_a_wrong_password_is_our_own_error(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobstore, "CONNECTION_TRIES", 0)
    url = valkey_url.replace(password(valkey_url), "wrong")
    with JobStore(url) as store, pytest.raises(JobStoreUnavailableError, match=r"WRONGPASS|password"):
        store.ping()


def test_a_key_of_another_kind_is_our_own_error(job_store: JobStore, raw: redis.Redis) -> None:
    record, _ = claimed(job_store)
    raw.set(f"{job_store._namespace}:job:{record.id}:parts", "not a hash")
    with pytest.raises(JobStoreUnavailableError, match="WRONGTYPE"):
        job_store.status(record.id)


def test_scripts_survive_their_flushing(job_store: JobStore, raw: redis.Redis) -> None:
    claimed(job_store, PlanningStarted())
    raw.script_flush()
    record, _ = claimed(job_store, PlanningStarted())
    assert job_store.get(record.id).attempt == 1


def test_every_key_is_in_the_table(job_store: JobStore, raw: redis.Redis, valkey_url: str) -> None:
    record = fresh(time.time()).model_copy(update={"key": "0" * 12})
    job_store.create(record)
    lease = job_store.acquire(record.id, "owner", 60)
    assert lease is not None
    for event in TO_RUNNING:
        job_store.apply(record.id, event, lease.token)
    job_store.record_part(lease, part(1))
    job_store.record_survey(lease, "s", 0, {}, 1)
    job_store.claim_output(lease, "file:///out")
    asked = once("key", "POST", "/", [], {}, 60)
    other = fresh(0).model_copy(update={"key": "0" * 12})
    job_store.create(other, asked)
    over, ending = claimed(job_store, Failed(ERROR))
    job_store.release(ending)
    with SweepStore(valkey_url, job_store._namespace) as sweeps:
        assert sweeps.lead("owner", 60)
    keys = {key.removeprefix(f"{job_store._namespace}:") for key in raw.keys(f"{job_store._namespace}:*")}
    names = {
        record.id: "<id>",
        other.id: "<id>",
        over.id: "<id>",
        "file:///out": "<uri>",
        asked.key: "<key>",
        "0" * 12: "<key>",
    }
    names |= {":running": ":<state>", ":queued": ":<state>", ":failed": ":<state>"}
    shown = {functools.reduce(lambda text, name: text.replace(name, names[name]), names, key) for key in keys}
    assert len(shown) == 22
    for key in shown:
        assert any(f"``{key}``" in str(module.__doc__) for module in (jobstore, queuescripts, sweepscripts))
