"""Webhooks, the pure part: signatures that others verify, when to try again, and which URLs can be one."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from service.jobs.events import JobEvent
from service.jobs.progress import Progress
from service.jobs.record import JobState
from service.settings import Settings
from service.webhooks.addresses import Destinations
from service.webhooks.webhooks import (
    BACKOFF,
    EVENTS,
    MAX_TRIES,
    Webhook,
    message,
    message_id,
    outcome,
    read_secret,
    signature,
    url_problem,
)

pytestmark = pytest.mark.fast

quick = settings(max_examples=50, deadline=None)

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
JOB = "merge-0" + "0" * 25
EVENT = JobEvent("1-0", JOB, "failed", JobState.FAILED, 3, 1.5, 'é "quoted"', Progress(parts_total=3))


class TestSignature:
    def test_the_specifications_own_vector(self) -> None:
        body = b'{"test": 2432232314}'
        found = signature(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
        assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

    @quick
    @given(st.binary(min_size=24, max_size=64), st.text(max_size=50))
    def test_another_implementation_verifies_it(self, key: bytes, detail: str) -> None:
        secret = "whsec_" + base64.b64encode(key).decode()
        event = JobEvent("1-0", JOB, "failed", JobState.FAILED, 3, 1.5, detail, Progress())
        now, name, body = int(time.time()), message_id(JOB, "1-0"), message(event)
        headers = {
            "webhook-id": name,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(secret, name, now, body),
        }
        assert Verifier(secret).verify(body, headers)["data"]["detail"] == detail
        for wrong in ({**headers, "webhook-id": "x"}, {**headers, "webhook-timestamp": str(now + 1)}):
            with pytest.raises(WebhookVerificationError):
                Verifier(secret).verify(body, wrong)

    def test_the_body(self) -> None:
        body = json.loads(message(EVENT))
        assert body["type"] == "merge.failed"
        assert body["timestamp"] == body["data"]["at"] == "1970-01-01T00:00:01.500Z"
        assert (body["data"]["job"], body["data"]["detail"]) == (JOB, 'é "quoted"')
        assert message(EVENT) == message(EVENT)

    @pytest.mark.parametrize(
        "secret",
        [
            "",
            "whsec_",
            SECRET[6:],
            "whsec_" + "A" * 28,
            "whsec_" + "A" * 88,
            SECRET + "!",
            "whsec_é" + "A" * 40,
        ],
    )
    def test_what_is_no_secret(self, secret: str) -> None:
        with pytest.raises(ValueError, match="whsec_ and 24 to 64") as caught:
            read_secret(secret)
        assert not secret[6:] or secret[6:] not in str(caught.value)

    def test_it_is_not_in_what_is_printed(self) -> None:
        assert SECRET not in repr(Webhook("https://x.test/", secret=SECRET))
        assert SECRET not in repr(Settings(webhook_secret=SECRET))


class TestTries:
    def test_they_go_on_for_about_a_day(self) -> None:
        for _ in range(20):
            total = sum(BACKOFF.pause(number) for number in range(1, MAX_TRIES))
            assert 20 * 3600 < total < 32 * 3600
        assert 4 <= BACKOFF.pause(1) <= 6

    def test_pauses_differ(self) -> None:
        assert len({BACKOFF.pause(5) for _ in range(10)}) == 10

    @pytest.mark.parametrize(
        ("status", "tries", "expected"),
        [
            (200, 1, "delivered"), (204, 11, "delivered"), (299, 1, "delivered"), (199, 1, "again"),
            (300, 1, "again"), (302, 1, "again"), (404, 1, "again"), (410, 1, "gone"), (500, 10, "again"),
            (500, 11, "failed"), (None, 1, "again"), (None, 11, "failed"), (410, 11, "gone"),
        ],
    )  # fmt: skip
    def test_what_comes_of_one(self, status: int | None, tries: int, expected: str) -> None:
        assert outcome(status, tries) == expected


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com/hook?x=1",
            "https://1.1.1.1:8443/",
            "https://bücher.example/",
            "https://a_b.test",
        ],
    )
    def test_what_is_taken(self, url: str) -> None:
        assert url_problem(url, Destinations()) is None

    @pytest.mark.parametrize(
        "url",
        [
            "", "example.com", "ftp://example.com", "file:///etc/passwd", "https://", "https:///x", "https://x y/",
            "http://example.com", "http://1.1.1.1", "https://127.0.0.1", "https://[::1]/", "https://[::ffff:7f00:1]/",
            "https://169.254.169.254/latest", "https://user:password@example.com", "https://user@example.com",
            "https://example.com/#fragment", "https://example.com:99999", "https://example.com/\n", "https://[::1",
            "https://example.com/" + "x" * 2048, "javascript:alert(1)",
        ],
    )  # fmt: skip
    def test_what_is_not(self, url: str) -> None:
        assert url_problem(url, Destinations()) is not None

    @quick
    @given(st.text(max_size=30) | st.text(max_size=20).map("https://{}".format))
    def test_whatever_comes_is_answered(self, url: str) -> None:
        if url_problem(url, Destinations()) is None:
            parsed = httpx.URL(url)
            assert (parsed.scheme, parsed.userinfo, parsed.fragment) == ("https", b"", "")
            assert parsed.host

    def test_where_the_deployment_allows_it(self) -> None:
        allowed = Destinations.parse(["127.0.0.0/8", "hooks.internal"])
        for url in ("http://127.0.0.1:1/", "http://hooks.internal/", "http://perhaps.internal/"):
            assert url_problem(url, allowed) is None  # the last one is found out when it is connected to
        assert url_problem("http://10.0.0.1/", allowed) is not None


class TestSettings:
    @pytest.mark.parametrize("secret", ["x", "whsec_tooshort", SECRET[:-2]])
    def test_a_wrong_secret_is_refused_without_being_told(self, secret: str) -> None:
        with pytest.raises(ValueError, match="whsec_ and 24") as caught:
            Settings(webhook_secret=secret)
        assert "24 to 64" in caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]
        assert secret == "x" or secret not in caught.value.errors(include_input=False)[0]["msg"]  # type: ignore[attr-defined]

    def test_places_are_read_at_the_start(self) -> None:
        assert Settings(webhook_allow_private=("10.0.0.0/8",)).webhook_destinations.allow_something()
        with pytest.raises(ValueError, match="no address"):
            Settings(webhook_allow_private=("10.0.0.1/8",))


def test_progress_is_no_webhooks_business() -> None:
    assert "progress" not in EVENTS
    assert {"succeeded", "failed", "cancelled", "created", "planned", "warning"} <= EVENTS
    assert datetime.fromisoformat(json.loads(message(EVENT))["timestamp"]).tzinfo == UTC
