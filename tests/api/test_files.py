"""Files that are served from a directory: only from those that may be used, and closed once they are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from api.app import create_app
from service.jobs.jobstore import JobStore
from service.jobs.transitions import CommitStarted, Succeeded
from service.settings import Settings
from tests.api.conftest import serving
from tests.api.test_routes import record
from tests.service.job_steps import ALL_COMPLETE, TO_RUNNING
from workers.store import StoreSettings

pytestmark = pytest.mark.valkey

Within = Callable[[Path | None], httpx.Client]


@pytest.fixture
def within(valkey_url: str, valkey_namespace: str) -> Iterator[Within]:
    """An API that may use one directory, or any."""
    with ExitStack() as running:

        def start(root: Path | None) -> httpx.Client:
            store = StoreSettings(file_roots=None if root is None else (str(root),))
            settings = Settings(redis_url=valkey_url, namespace=valkey_namespace, auth="off", store=store)
            return running.enter_context(serving(create_app(settings)))

        yield start


@pytest.fixture
def path(job_store: JobStore, tmp_path: Path) -> str:
    """Where a file of a job that has merged into ``tmp_path`` is served."""
    (tmp_path / "config.json").write_bytes(b"0123456789")
    files = [{"name": "config.json", "size": 10, "digest": "sha256:x"}]
    events = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": files}))
    return f"/v1/merges/{record(job_store, *events, output=tmp_path.as_uri()).id}/files/config.json"


@pytest.mark.parametrize(
    ("target", "otherwise"),
    [("../secret", 200), ("/etc/passwd", 410), ("/dev/zero", 404), ("../outside", 404)],
)
def test_a_link_that_was_put_there_leads_nowhere(
    within: Within, path: str, tmp_path: Path, target: str, otherwise: int
) -> None:
    (tmp_path.parent / "outside").mkdir(exist_ok=True)
    (tmp_path.parent / "secret").write_bytes(b"9876543210")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(target)
    answer = within(tmp_path).get(path)
    assert answer.status_code == 502
    assert answer.json()["type"] == "urn:mergemill:error:access_denied"
    assert within(None).get(path).status_code == otherwise


def test_nothing_is_served_from_elsewhere(within: Within, path: str, tmp_path: Path) -> None:
    assert within(tmp_path / "nowhere").get(path).status_code == 502
    assert within(tmp_path).get(path).content == b"0123456789"


def test_descriptors_are_closed(within: Within, path: str, tmp_path: Path) -> None:
    api = within(tmp_path)
    assert api.get(path).content == b"0123456789"
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert api.get(path).content == b"0123456789"
        assert api.get(path, headers={"range": "bytes=2-3"}).content == b"23"
        assert api.get(path, headers={"range": "bytes=90-"}).status_code == 416
        assert api.head(path).headers["content-length"] == "10"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 5
