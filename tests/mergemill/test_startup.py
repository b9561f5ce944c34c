"""What takes a process of its own to see: how quickly the command line starts, and what ``serve`` does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def test_help_is_quick_and_loads_nothing_big() -> None:
    code = (
        "import sys, time; begun = time.process_time();"
        "from typer.testing import CliRunner; from mergemill.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "big = {'torch', 'ray', 'numpy', 'boto3', 'httpx', 'pydantic', 'fastapi', 'redis'} & set(sys.modules);"
        "print(time.process_time() - begun); sys.exit(f'loaded {big}' if big else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.7  # of one processor: wall time is the neighbours' too


def test_who_only_serves_and_plans_loads_no_torch() -> None:
    code = (
        "import sys, api.app, service.running.scheduler;"
        "big = {'torch', 'numba', 'ray'} & set(sys.modules); sys.exit(f'loaded {big}' if big else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_serve_says_when_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {**os.environ, "MERGEMILL_PORT": str(taken.getsockname()[1]), "MERGEMILL_LOG_FORMAT": "console"}
        command = [sys.executable, "-m", "mergemill", "serve"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode not in {0, 2}
    assert "address already in use" in done.stderr
