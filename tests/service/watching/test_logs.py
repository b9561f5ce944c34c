"""Logs: one line an event, from structlog and the standard library alike, and never a secret."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from service.watching import logs
from service.watching.logs import configure
from workers.redaction import HIDDEN, hidden_text

pytestmark = pytest.mark.fast

PASSWORD = "hunter2-Ünguessable"
LEAKS = [
    f"redis://:{PASSWORD}@127.0.0.1:6379/0",
    f"cannot reach redis://user:{PASSWORD}@host:1/0 now",
    f"https://b.s3/k?X-Amz-Date=1&X-Amz-Signature={PASSWORD}&x=1",
    f"https://b.s3/k?X-Amz-Credential={PASSWORD}",
    f"https://b.s3/k?x-amz-security-token={PASSWORD}&a=b",
    f"Authorization: Bearer {PASSWORD}",
    f"{{'Authorization': '{PASSWORD}'}}",
    f"Authorization: AWS4-HMAC-SHA256 Credential={PASSWORD}, SignedHeaders=host, Signature={PASSWORD}",
    f"AWS_SECRET_ACCESS_KEY={PASSWORD}",
    f"aws_session_token = {PASSWORD}",
    f'{{"SecretAccessKey": "{PASSWORD}", "SessionToken":"{PASSWORD}"}}',
    f"<secretAccessKey>: {PASSWORD}".replace(">:", ":"),
]
TOKENS = [
    "mm_0123456789ab_" + "0f" * 32,
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What has gone to standard error since the last call; afterwards, logging is as it was."""
    root = logging.getLogger()
    handlers, level, quiet = (
        root.handlers[:],
        root.level,
        {name: logging.getLogger(name).level for name in logs._QUIET},
    )
    try:
        yield lambda: capsys.readouterr().err
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in quiet.items():
            logging.getLogger(name).setLevel(before)


def test_json_is_one_object_a_line(logged: Callable[[], str]) -> None:
    configure("json")
    structlog.get_logger("a.b").info("something", job="merge-1", count=3)
    logging.getLogger("uvicorn.error").warning("plain %s", "text")
    structlog.get_logger("a.b").debug("not this")
    logging.getLogger("botocore").info("nor this")
    first, second = map(json.loads, logged().splitlines())
    assert first["timestamp"].endswith("Z")
    assert {key: first[key] for key in ("event", "level", "logger", "job", "count")} == {
        "event": "something", "level": "info", "logger": "a.b", "job": "merge-1", "count": 3
    }  # fmt: skip
    assert (second["event"], second["level"], second["logger"]) == ("plain text", "warning", "uvicorn.error")


def test_console_has_no_colours_where_there_is_no_terminal(logged: Callable[[], str]) -> None:
    configure("console")
    structlog.get_logger("a").info("something", job="merge-1")
    written = logged()
    assert "something" in written
    assert "job=merge-1" in written
    assert "\x1b" not in written


def test_auto_is_json_where_there_is_no_terminal(logged: Callable[[], str]) -> None:
    configure("auto")
    structlog.get_logger("a").info("something")
    assert json.loads(logged())["event"] == "something"


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("leak", LEAKS)
def test_no_secret_is_logged(logged: Callable[[], str], log_format: str, leak: str) -> None:
    configure(log_format)
    log = structlog.get_logger("a")
    log.info(leak)
    log.info("nested", where={"deep": [leak]}, error=ValueError(leak))
    log.info(
        "named",
        password=PASSWORD,
        s3_secret_access_key=PASSWORD,
        Authorization=PASSWORD,
        session_token=PASSWORD,
    )
    logging.getLogger("b").error("from the library: %s", leak)
    try:
        raise ValueError(leak)
    except ValueError:
        log.exception("it broke")
        logging.getLogger("b").exception("it broke")
    written = logged()
    assert "ValueError" in written
    assert written.count("Traceback") == 2
    assert HIDDEN in written
    assert PASSWORD not in written
    assert PASSWORD.encode("unicode_escape").decode() not in written


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "around", ["{}", "the key {} is wrong", "x={},y", '{{"a": "{}"}}', "Bearer {}", "(({}))"]
)
def test_a_token_is_known_by_its_looks(token: str, around: str) -> None:
    shown = hidden_text(around.format(token))
    assert HIDDEN in shown
    assert token not in shown
    assert token[-10:] not in shown


def test_which_key_it_was_is_told() -> None:
    assert hidden_text(f"no scope: {TOKENS[0]}") == f"no scope: mm_0123456789ab_{HIDDEN}"


def test_what_is_no_secret_stays(logged: Callable[[], str]) -> None:
    configure("json")
    kept = {
        "tokenizer": "base",
        "token": 7,
        "output": "s3://bucket/a@b",
        "at": "12:30",
        "url": "http://host:80/a?b=c",
        "part": "0f" * 16,
        "job": "merge-01jd8x7c5n9m0v3q2w4e6r8t0y",
        "request": "3c01f6fd94a0a9bcd0be6d66",
        "etag": "d41d8cd98f00b204e9800998ecf8427e",
        "what": "the mm_model tensor of a mm_0 layer, bearer of news",
    }
    structlog.get_logger("a").info("something", **kept)
    written = json.loads(logged())
    assert {key: written[key] for key in kept} == kept


@given(st.text(st.characters(blacklist_characters="/:@'\"", blacklist_categories=("Z", "C")), min_size=1))
def test_any_password_of_a_url_is_hidden(password: str) -> None:
    assert hidden_text(f"at redis://:{password}@host") == f"at redis://:{HIDDEN}@host"


def test_a_whole_page_takes_no_time() -> None:
    for page in ("a", "mm_", "whsec_", "://a:", "bearer ", "Signature=", "secret", "AKIA", "authorization "):
        begun = time.process_time()
        hidden_text(page * (300_000 // len(page)))
        assert time.process_time() - begun < 2, page


def test_a_webhooks_secret_is_hidden_wherever_it_stands() -> None:
    assert (
        hidden_text("told with whsec_MfKQ9r8GKYqrTwjUPD8I/PZ+o2LaLaSw== and more")
        == "told with whsec_*** and more"
    )
