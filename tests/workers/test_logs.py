"""What a worker logs: JSON lines with the ids of the task that they are about, whichever thread it is in."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.planning.plan import PlanOptions
from tests.checkpoints import fine_tune, llama_tensors
from tests.workers.execute import plan, write_models
from tests.workers.test_entry import payloads
from workers import entry
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast


class Lines(logging.Handler):
    """What was logged, with the ids that were bound where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], str | None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        bound = structlog.contextvars.get_contextvars()
        self.found.append((record.getMessage(), bound, getattr(record, "part", None)))


def test_each_task_s_lines_have_its_ids(tmp_path: Path) -> None:
    base = llama_tensors(1)
    models = {"base": base} | {name: fine_tune(base, seed) for seed, name in enumerate("ab")}
    write_models(tmp_path, models)
    planned = plan(tmp_path, "ties", ["a", "b"], {"density": 0.5}, PlanOptions(shard_bytes=60_000))
    asked = payloads(LocalStore(), planned, tmp_path / "out")
    for number, payload in enumerate(asked):
        payload["ids"] = {"job": "merge-x", "part": f"part {number}"}
    asked[1]["part"] = "{}"
    del asked[2]["ids"]
    lines = Lines()
    logger = logging.getLogger("workers")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        with structlog.contextvars.bound_contextvars(mine="kept"):
            answers = dict(entry.tasks(asked))
            assert structlog.contextvars.get_contextvars() == {"mine": "kept"}
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)
    assert len(answers) == len(asked) > 3
    written = [bound for told, bound, _ in lines.found if told == "part written"]
    wanted = [{"job": "merge-x", "part": f"part {number}"} for number in range(len(asked))]
    wanted[2] = {}
    assert written == [wanted[0], *wanted[2:]]
    ((failed, part),) = [(told, part) for told, _, part in lines.found if told.startswith("task failed")]
    assert "validation error" in failed
    assert part == "part 1"


def test_a_worker_process_writes_json_lines_without_secrets() -> None:
    code = (
        "import logging; from workers import logs; logs.configure(); logs.configure();"
        "logs.about({'job': 'j', 'part': 'p'});"
        "log = logging.getLogger('workers.run'); log.info('part written', extra={'number': 3});"
        "log.warning('https://h/k?X-Amz-Signature=abcdef'); logging.getLogger('botocore').info('not this')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stderr.splitlines())
    assert {**first, "timestamp": 0} == {
        "event": "part written", "job": "j", "part": "p", "number": 3, "level": "info", "logger": "workers.run",
        "timestamp": 0,
    }  # fmt: skip
    assert second["event"] == "https://h/k?X-Amz-Signature=***"


def test_who_has_set_up_logs_keeps_them() -> None:
    code = (
        "import logging; logging.basicConfig(format='mine %(message)s'); from workers import logs;"
        "logs.configure(); logging.getLogger('workers').warning('x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "mine x\n"
