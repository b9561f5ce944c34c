"""Logs: one line an event, from structlog and the standard library alike, and never a secret."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from service import logs
from service.logs import HIDDEN, configure, hidden_text

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


def test_what_is_no_secret_stays(logged: Callable[[], str]) -> None:
    configure("json")
    kept = {
        "tokenizer": "base",
        "token": 7,
        "output": "s3://bucket/a@b",
        "at": "12:30",
        "url": "http://host:80/a?b=c",
    }
    structlog.get_logger("a").info("something", **kept)
    written = json.loads(logged())
    assert {key: written[key] for key in kept} == kept


@given(st.text(st.characters(blacklist_characters="/:@'\"", blacklist_categories=("Z", "C")), min_size=1))
def test_any_password_of_a_url_is_hidden(password: str) -> None:
    assert hidden_text(f"at redis://:{password}@host") == f"at redis://:{HIDDEN}@host"


def test_a_whole_page_takes_no_time() -> None:
    assert re.fullmatch(r"a+", hidden_text("a" * 1_000_000))


def test_a_webhooks_secret_is_hidden_wherever_it_stands() -> None:
    assert (
        hidden_text("told with whsec_MfKQ9r8GKYqrTwjUPD8I/PZ+o2LaLaSw== and more")
        == "told with whsec_*** and more"
    )
