"""What the image runs besides Mergemill itself, run for real with stand-ins on the PATH."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from tests.processes import running

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder for stand-ins."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def _stand_in(path: Path, name: str, script: str) -> None:
    """A program that first says that it runs and what it was given."""
    program = path / name
    program.write_text(f'#!/bin/bash\necho "$$ $*" > {path.parent / name}.started\n{script}\n')
    program.chmod(0o755)


def _wait_for(path: Path) -> list[str]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text.split()
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _schedule_on_ray(path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    env = {"PATH": f"{path}:{os.environ['PATH']}", "RAY_ADDRESS": "ray-head:6379"}
    with running([ROOT / "deploy/schedule-on-ray", *arguments], env=env, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


FOREVER = "trap 'exit 0' TERM; while :; do read -rt 0.05 <> <(:) || :; done"
"""A program that runs until it is told to end, without a child of its own that could be left behind."""


@pytest.mark.parametrize(("ending", "staying"), [("ray", "mergemill"), ("mergemill", "ray")])
def test_when_one_of_both_ends_the_other_ends_too(path: Path, ending: str, staying: str) -> None:
    _stand_in(path, staying, FOREVER)
    _stand_in(path, ending, f"until [ -s {path.parent / staying}.started ]; do :; done; exit 7")
    with _schedule_on_ray(path) as process:
        assert process.wait(timeout=20) == 7
        pid, *_ = _wait_for(path.parent / f"{staying}.started")
        assert not _is_running(pid)


def test_it_ends_both_when_it_is_told_to_end(path: Path) -> None:
    _stand_in(path, "ray", FOREVER)
    _stand_in(path, "mergemill", FOREVER)
    with _schedule_on_ray(path, "--verbose") as process:
        node, *node_arguments = _wait_for(path.parent / "ray.started")
        scheduler, *arguments = _wait_for(path.parent / "mergemill.started")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        assert not _is_running(node)
        assert not _is_running(scheduler)
    assert arguments == ["schedule", "--verbose"]
    assert node_arguments[:2] == ["start", "--address=ray-head:6379"]
    assert {"--num-cpus=0", "--memory=0", "--block"} <= set(node_arguments)


def test_a_cluster_must_be_named(path: Path) -> None:
    _stand_in(path, "ray", FOREVER)
    done = subprocess.run(
        [ROOT / "deploy/schedule-on-ray"],
        check=False,
        env={"PATH": f"{path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode != 0
    assert "RAY_ADDRESS" in done.stderr
    assert not (path.parent / "ray.started").exists()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3 in this process, with credentials that are nobody's."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MERGEMILL_STORE__S3_ENDPOINT_URL", raising=False)
    with mock_aws():
        yield


def _create_bucket(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "argv", ["create-bucket", name])
    runpy.run_path(str(ROOT / "deploy/create-bucket"), run_name="__main__")


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_a_bucket_is_made_once_and_then_left_alone(
    aws: None, monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    monkeypatch.setenv("MERGEMILL_STORE__S3_REGION", region)
    s3 = boto3.client("s3", region_name=region)
    _create_bucket(monkeypatch, "models")
    s3.put_object(Bucket="models", Key="kept", Body=b"x")
    _create_bucket(monkeypatch, "models")
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["models"]
    assert s3.get_object(Bucket="models", Key="kept")["Body"].read() == b"x"
    assert (s3.get_bucket_location(Bucket="models")["LocationConstraint"] or "us-east-1") == region


def test_a_bucket_that_cannot_be_made_is_an_error(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClientError, match="InvalidBucketName"):
        _create_bucket(monkeypatch, "xy")


def test_the_image_installs_every_dependency_but_torch(tmp_path: Path) -> None:
    program = re.search(r"python -c '([^']+)'", DOCKERFILE)
    assert program is not None
    listed = subprocess.run(
        [sys.executable, "-c", program[1].replace("\\\n", "")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["otel"]
    assert listed == [line for line in wanted if not line.startswith("torch==")]
    assert len(listed) == len(wanted) - 1


@pytest.mark.parametrize("status", [200, 503])
def test_the_image_is_as_healthy_as_its_api(status: int) -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    check = re.search(r"HEALTHCHECK.*\\\n\s*CMD (\[.*\])", DOCKERFILE)
    assert check is not None
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {**os.environ, "MERGEMILL_PORT": str(server.server_port)}
        command = [sys.executable, *json.loads(check[1])[1:]]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=30)
    assert asked == ["/healthz"]
    assert (done.returncode == 0) == (status == 200)
