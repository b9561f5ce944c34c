"""How hard properties are tried: little in ``make test``, and as long as one likes in ``make fuzz``.

``python -m tests.fuzzing MINUTES`` runs every test that :func:`fuzzed` marks, over and over, each round from a seed of
its own and with :data:`FACTOR` times the examples. The first round that fails ends it, and says how to repeat it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("MERGEMILL_FUZZ_FACTOR", "1"))
"""How many times the usual number of examples is tried."""

ROUND = "20"
"""The factor of one round of :func:`main`."""

Test = TypeVar("Test", bound=Callable[..., Any])


def fuzzed(examples: int) -> Callable[[Test], Test]:
    """Try a property with this many examples, times :data:`FACTOR`, and have ``make fuzz`` find it."""
    calm = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

    def decorate(test: Test) -> Test:
        tried = settings(max_examples=examples * FACTOR, deadline=None, suppress_health_check=calm)(test)
        marked: Test = pytest.mark.fuzz(tried)
        return marked

    return decorate


def main(minutes: float) -> int:
    """Fuzz for this long; the exit status of the last round."""
    end = time.monotonic() + 60 * minutes
    rounds = 0
    while time.monotonic() < end:
        seed = secrets.randbits(32)
        pytest_ = ["pytest", "-m", "fuzz", "-q", "-x", "--timeout", "3600", f"--hypothesis-seed={seed}"]
        factor = {"MERGEMILL_FUZZ_FACTOR": ROUND}
        status = subprocess.run(
            [sys.executable, "-m", *pytest_], env=os.environ | factor, check=False
        ).returncode
        if status:
            sys.stderr.write(f"repeat it: MERGEMILL_FUZZ_FACTOR={ROUND} python -m {' '.join(pytest_)}\n")
            return status
        rounds += 1
    sys.stderr.write(f"{rounds} rounds of fuzzing, nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
