"""The gateway that tests run on ends with whoever started it, and its absence is not passed over in CI."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import rgw_fixtures
from tests.servers.rgw import missing_binaries


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.rgw
def test_killing_the_owner_ends_every_daemon(tmp_path: Path) -> None:
    if missing_binaries():
        rgw_fixtures.give_up(missing_binaries())
    with subprocess.Popen(
        [sys.executable, "-m", "tests.servers.rgw"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith("export AWS_ENDPOINT_URL_S3=http://127.0.0.1:")
        daemons = _children(owner.pid)
        assert len(daemons) == 3
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(_runs, daemons)):
        assert time.monotonic() < deadline, f"still running: {daemons}"
        time.sleep(0.05)


@pytest.mark.fast
@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_gateway_fails_in_ci_and_skips_elsewhere(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="need radosgw: apt-get install radosgw ceph-mon ceph-osd"):
        rgw_fixtures.give_up(["radosgw"])
