"""Imported by every Python that starts with this directory on its path: a Ray worker limits its own memory first.

By a control group where one can be made, v2's or v1's, which kills the process that goes beyond it; else by
RLIMIT_DATA, which refuses it memory. A note in ``MERGEMILL_TEST_LIMITS`` says which process has which limit.
"""

import os
import resource
import sys
from pathlib import Path

GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


def limit(nbytes: int) -> str:
    for root, name in GROUPS:
        group = root / f"mergemill-test-{os.getpid()}"
        try:
            group.mkdir()
            with (group / name).open("r+") as file:  # it is there already, or this is no such file system
                file.write(str(nbytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return str(group)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    return "RLIMIT_DATA"


if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
    notes, nbytes = os.environ["MERGEMILL_TEST_LIMITS"].rsplit(":", 1)
    Path(notes, str(os.getpid())).write_text(limit(int(nbytes)))
