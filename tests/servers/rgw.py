"""A real S3 server for tests and benchmarks: one Ceph monitor, one OSD and one RADOS gateway on loopback.

Everything lives in a temporary directory and in memory; nothing is kept. ``python -m tests.servers.rgw``
runs it until Ctrl-C. Needs Debian's ``radosgw ceph-mon ceph-osd`` (tested with 16.2); no root.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BINARIES = (
    "ceph-mon",
    "ceph-osd",
    "radosgw",
    "radosgw-admin",
    "ceph",
    "ceph-authtool",
    "monmaptool",
    "setpriv",
)
INSTALL_HINT = "apt-get install radosgw ceph-mon ceph-osd"
STORE_BYTES = 4 << 30
"""How much the in-memory OSD holds by default, in bytes; memory is only taken as it fills."""

log = logging.getLogger(__name__)


class RGWError(RuntimeError):
    """Ceph did not come up; the message ends with the log of the daemon that failed."""


@dataclass
class RGW:
    """A running gateway."""

    endpoint_url: str
    """``http://127.0.0.1:<port>``."""
    access_key: str
    """Access key id of a user who may do everything with his own buckets."""
    secret_key: str
    """The user's secret key."""
    directory: Path
    """Configuration, keyrings and logs."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Monitor, OSD, gateway, in the order of their start."""

    def __enter__(self) -> RGW:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes, last started first, and remove the directory. Safe to call twice."""
        while self.processes:
            _end(self.processes.pop())
        shutil.rmtree(self.directory, ignore_errors=True)


def missing_binaries() -> list[str]:
    """The programs that are needed and not on the PATH."""
    return [name for name in BINARIES if shutil.which(name) is None]


def start_rgw(store_bytes: int = STORE_BYTES) -> RGW:
    """Start a gateway and make a user; about 15 seconds. Use it in a ``with`` block, or call ``stop``.

    :param store_bytes: how much the in-memory OSD holds, in bytes; memory is only taken as it fills.
    :raises RGWError: it did not come up.
    """
    directory = Path(tempfile.mkdtemp(prefix="rgw-"))
    rgw = RGW("", secrets.token_hex(10).upper(), secrets.token_hex(20), directory)
    try:
        _bring_up(rgw, store_bytes)
    except BaseException:
        rgw.stop()
        raise
    return rgw


def _bring_up(rgw: RGW, store_bytes: int) -> None:
    directory = rgw.directory
    mon_port, rgw_port = _free_ports(2)
    fsid = str(uuid.uuid4())
    conf = directory / "ceph.conf"
    conf.write_text(_configuration(directory, fsid, mon_port, store_bytes))
    for name in ("mon", "osd", "rgw"):
        (directory / name).mkdir()
    keyring = str(directory / "keyring")
    everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
    _run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for entity in ("client.admin", "client.rgw", "osd.0"):
        # With `profile osd` in place of `allow *` the OSD would do as well; one rule for all is simpler.
        _run("ceph-authtool", keyring, "--gen-key", "-n", entity, *everything)
    monmap = str(directory / "monmap")
    _run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
    common = ["-c", str(conf)]
    _run("ceph-mon", *common, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    _spawn(rgw, "ceph-mon", *common, "-f", "-i", "a")
    admin = ["ceph", *common, "--connect-timeout", "30"]
    osd_uuid = str(uuid.uuid4())
    _run(*admin, "osd", "new", osd_uuid, "0")
    _run("ceph-osd", *common, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
    _spawn(rgw, "ceph-osd", *common, "-f", "-i", "0")
    _run(
        "radosgw-admin", *common, "user", "create", "--uid=mergemill", "--display-name=Mergemill",
        f"--access-key={rgw.access_key}", f"--secret-key={rgw.secret_key}",
    )  # fmt: skip
    frontend = f"beast endpoint=127.0.0.1:{rgw_port}"
    _spawn(rgw, "radosgw", *common, "-f", "-n", "client.rgw", f"--rgw-frontends={frontend}")
    rgw.endpoint_url = f"http://127.0.0.1:{rgw_port}"
    _wait(rgw, lambda: _answers(rgw.endpoint_url), deadline_s=60)


def _configuration(directory: Path, fsid: str, mon_port: int, store_bytes: int) -> str:
    return f"""
[global]
fsid = {fsid}
run dir = {directory}
log file = {directory}/$name.log
admin socket =
crash dir = {directory}
keyring = {directory}/keyring
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
mon data = {directory}/mon
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
mon data avail crit = 1
mon cluster log file = {directory}/cluster.log
osd data = {directory}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = true
osd class load list = *
osd class default list = *
osd op num shards = 2
osd op num threads per shard = 2
rgw data = {directory}/rgw
rgw thread pool size = 32
rgw cache enabled = true
rgw enable usage log = false
rgw enable ops log = false
rgw dynamic resharding = false
rgw override bucket index max shards = 1
rgw gc obj min wait = 1
rgw gc processor period = 2
rgw gc processor max time = 2
"""


def _spawn(rgw: RGW, *command: str) -> None:
    """Start a daemon that dies with us: the kernel kills it when this thread ends, however it ends."""
    output = (rgw.directory / f"{command[0]}.out").open("wb")
    with output:
        rgw.processes.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=rgw.directory,
            )
        )  # fmt: skip


def _run(*command: str) -> None:
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired as late:
        raise RGWError(f"{' '.join(command)} hung") from late
    log.debug("%s took %.1f s", command[0], time.monotonic() - started)
    if done.returncode:
        raise RGWError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def _wait(rgw: RGW, ready: Callable[[], bool], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not ready():
        for process in rgw.processes:
            if process.poll() is not None:
                raise RGWError(f"{process.args!r} ended with {process.returncode}: {_tail(rgw.directory)}")
        if time.monotonic() > deadline:
            raise RGWError(f"not ready after {deadline_s} s: {_tail(rgw.directory)}")
        time.sleep(0.1)


def _tail(directory: Path) -> str:
    outputs = sorted(directory.glob("*.out")) + sorted(directory.glob("*.log"))
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in outputs)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own loopback server
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)  # nothing is kept, so there is nothing to flush
    process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """Run a gateway until Ctrl-C and say how to reach it."""
    if missing := missing_binaries():
        raise SystemExit(f"missing {', '.join(missing)}: {INSTALL_HINT}")
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"))
    with start_rgw() as rgw:
        sys.stdout.write(
            f"export AWS_ENDPOINT_URL_S3={rgw.endpoint_url}\n"
            f"export AWS_ACCESS_KEY_ID={rgw.access_key}\n"
            f"export AWS_SECRET_ACCESS_KEY={rgw.secret_key}\n"
            f"export AWS_DEFAULT_REGION=us-east-1\n"
        )
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
