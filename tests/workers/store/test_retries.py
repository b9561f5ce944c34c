"""When requests are sent again, and when that is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.store.faulty import Answer, FaultyServer, error, faulty_server, ranged
from tests.workers.store.test_s3_faults import ATTEMPTS, HEAD, URI, settings_for
from workers.errors import AccessDeniedError, StoreError, StoreUnavailableError
from workers.store import StoreSettings, read_range
from workers.store.retries import RETRIES, RetryBudget, Tally, Tries
from workers.store.s3 import S3Store

SLOW = error(503, "SlowDown")
TEN = ranged(b"0123456789", 0, 10)


@pytest.mark.fast
@given(
    attempts=st.integers(1, 30),
    first=st.floats(1e-3, 10),
    longest=st.floats(1e-3, 60),
    asked=st.floats(0, 1e6),
)
def test_waits_are_bounded_and_as_long_as_the_store_asks_for(
    attempts: int, first: float, longest: float, asked: float
) -> None:
    settings = StoreSettings(
        s3_max_attempts=attempts, s3_retry_wait_s=first, s3_retry_wait_max_s=longest, s3_retry_budget=100
    )
    tries = Tries(settings, RetryBudget(100))
    waits = []
    while (wait := tries.wait_s("throttled", asked)) is not None:
        waits.append(wait)
    assert len(waits) == attempts - 1
    for number, wait in enumerate(waits):
        assert min(asked, longest) <= wait <= max(min(longest, first * 2**number), min(asked, longest))
    assert not tries.spent


@pytest.mark.fast
def test_waits_are_spread_from_nothing_on() -> None:
    """Full jitter: clients that failed together do not come back together."""
    settings = StoreSettings(s3_retry_wait_s=1, s3_retry_wait_max_s=1)
    waits = sorted(Tries(settings, RetryBudget(1)).wait_s("throttled") or 0 for _ in range(1000))
    for tenth in range(10):
        assert 50 < sum(tenth / 10 <= wait < (tenth + 1) / 10 for wait in waits) < 200


@pytest.mark.fast
def test_a_budget_that_is_spent_ends_all_retries_until_requests_succeed() -> None:
    settings, budget = StoreSettings(s3_max_attempts=3), RetryBudget(3)
    for _ in range(3):
        assert Tries(settings, budget).wait_s("timeout") is not None
    tries = Tries(settings, budget)
    assert tries.wait_s("timeout") is None
    assert (tries.sent, tries.spent) == (1, True)
    assert "not again, since too many requests" in tries.told
    for _ in range(9):
        budget.succeeded(retried=False)
    assert Tries(settings, budget).wait_s("timeout") is None
    budget.succeeded(retried=False)
    assert Tries(settings, budget).wait_s("timeout") is not None
    budget.succeeded(retried=True)
    assert Tries(settings, budget).wait_s("timeout") is not None
    for _ in range(1000):
        budget.succeeded(retried=True)  # it holds no more than in the beginning
    assert sum(Tries(settings, budget).wait_s("timeout") is not None for _ in range(10)) == 3


@pytest.mark.fast
def test_a_tally_is_taken_once() -> None:
    tally = Tally()
    for cause in ("timeout", "throttled", "timeout"):
        tally.add(cause)
    assert tally.take() == {"timeout": 2, "throttled": 1}
    assert tally.take() == {}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture(scope="module")
def store(server: FaultyServer) -> Iterator[S3Store]:
    """One for all: making a boto3 client takes longer than the tests."""
    store = S3Store(settings_for(server.url, s3_retry_budget=5, s3_retry_wait_max_s=3))
    yield store
    store.close()


def test_an_outage_is_met_with_a_bounded_number_of_requests(server: FaultyServer, store: S3Store) -> None:
    """Whoever comes later pays for those before: a store that is down is not held down."""
    server.restart(SLOW)
    RETRIES.take()
    for _ in range(20):
        with pytest.raises(
            StoreUnavailableError, match=r"SlowDown.*sent \d times|SlowDown.*sent once, and not again"
        ):
            read_range(store, URI, 0, 10, "e1")
    assert len(server.requests) == 20 + 5
    assert RETRIES.take() == {"throttled": 5}
    server.restart(*[TEN] * 10, SLOW, *[TEN] * 41)
    for _ in range(51):  # it is up again: ten that succeed at once make up for one that does not
        assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
    assert len(server.requests) == 52


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (error(429, "TooManyRequests"), "throttled"),
        (error(500, "InternalError"), "server_error"),
        (error(400, "RequestTimeout"), "timeout"),
        (error(400, "XAmzContentSHA256Mismatch"), "checksum"),
        (error(400, "BadDigest"), "checksum"),
        (Answer(0, reset=True), "connection"),
        (ranged(b"01234", 0, 10, length=10), "connection"),
        (ranged(b"01234", 0, 10, length=10, hang=True), "timeout"),
    ],
    ids=repr,
)
def test_retries_are_counted_by_cause(
    server: FaultyServer, store: S3Store, fault: Answer, cause: str
) -> None:
    server.restart(fault, TEN)
    RETRIES.take()
    assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
    assert RETRIES.take() == {cause: 1}


def test_a_store_that_asks_for_time_gets_it(
    server: FaultyServer, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    slow = [
        Answer(503, b"", {"Retry-After": after}) for after in ("2", "3600", "Wed, 21 Oct 2026 07:28:00 GMT")
    ]
    server.restart(*slow, HEAD)
    assert store.head(URI).size == 5
    assert waits[:2] == [2, 3]
    assert 0 <= waits[2] <= 0.004


class TestCredentials:
    """Those that ran out are looked up again, once, where they can have changed."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A shared credentials file that boto3 finds, and nothing else."""
        path = tmp_path / "credentials"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self.write(path, "OLD")
        return path

    @staticmethod
    def write(path: Path, key: str) -> None:
        path.write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
        )

    @pytest.fixture
    def store(self, server: FaultyServer, file: Path) -> Iterator[S3Store]:
        store = S3Store(settings_for(server.url, s3_access_key_id=None, s3_secret_access_key=None))
        yield store
        store.close()

    @staticmethod
    def keys(server: FaultyServer) -> list[str]:
        """The access keys that requests were signed with."""
        return [headers["authorization"].partition("Credential=")[2][:3] for _, _, headers in server.requests]

    def test_new_ones_are_used_once_and_within_the_same_request(
        self, store: S3Store, server: FaultyServer, file: Path
    ) -> None:
        server.restart(TEN, error(403, "ExpiredToken"), TEN)
        assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
        used = store._connection._made()
        self.write(file, "NEW")
        assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
        assert self.keys(server) == ["OLD", "OLD", "NEW"]
        assert store._connection._renew(used)  # a thread that comes second finds it done
        assert store._connection.client.meta.events is not used.client.meta.events
        server.restart(Answer(400))  # all that S3 says where an answer has no body
        self.write(file, "BAD")
        with pytest.raises(StoreError, match=r"cannot look up s3://bucket/object.*400"):
            store.head(URI)
        assert dict.fromkeys(self.keys(server)) == dict.fromkeys(
            ["NEW", "BAD"]
        )  # boto3 asks for the region, too
        file.unlink()
        with pytest.raises(AccessDeniedError, match="renew them"):
            server.restart(error(400, "ExpiredToken"))
            read_range(store, URI, 0, 10, "e1")
        assert self.keys(server) == ["BAD"]

    def test_an_answer_without_a_body_may_mean_that_they_were_withdrawn(
        self, store: S3Store, server: FaultyServer, file: Path
    ) -> None:
        server.restart(Answer(403), Answer(200, headers={"ETag": '"e1"'}, length=10))
        with pytest.raises(AccessDeniedError, match="check the credentials"):
            store.head(URI)
        assert set(self.keys(server)) == {"OLD"}
        server.restart(Answer(403), Answer(200, headers={"ETag": '"e1"'}, length=10))
        self.write(file, "NEW")
        assert store.head(URI).etag == "e1"
        assert list(dict.fromkeys(self.keys(server))) == ["OLD", "NEW"]

    def test_those_that_have_not_changed_fail_at_once(self, server: FaultyServer) -> None:
        store = S3Store(settings_for(server.url))
        server.restart(error(403, "ExpiredToken"))
        with pytest.raises(
            AccessDeniedError, match=r"cannot read s3://bucket/object.*ExpiredToken.*renew them"
        ):
            read_range(store, URI, 0, 10, "e1")
        assert len(server.requests) == 1 < ATTEMPTS
        store.close()
