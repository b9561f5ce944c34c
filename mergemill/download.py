"""Download a merged checkpoint: several files at once, resumable, checked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from mergemill.digests import verify
from mergemill.jobs import File
from workers.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    MergemillError,
    ObjectNotFoundError,
    OutputReplacedError,
    StoreError,
    StoreUnavailableError,
    TruncatedReadError,
)

PARALLEL = 4
"""Files that are downloaded at once."""

ATTEMPTS = 6
"""How often in a row a file may be asked for in vain; each attempt goes on where the one before broke off."""

WAIT_S = 0.1
"""Half of the first wait between two attempts, in seconds; it doubles with each that brings nothing."""

INDEX = "model.safetensors.index.json"
"""The file that makes a directory a checkpoint: it comes last."""


def download(
    http: httpx.Client,
    base_url: str,
    list_files: Callable[[], Sequence[File]],
    directory: Path,
    on_progress: Callable[[int, int], None] | None,
    on_repair: Callable[[str], None] | None = None,
) -> None:
    """Bring every file into ``directory``; see :meth:`mergemill.client.Client.download`."""
    files = list_files()
    for file in files:
        _check_name(file.name)
    with _named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _check_place(directory, {file.name for file in files})
        _bring(http, _Urls(base_url, list_files, files), files, directory, on_progress, on_repair)


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """What the operating system refuses as an error that names the directory."""
    try:
        yield
    except MergemillError:
        raise
    except OSError as error:
        where = error.filename or directory
        raise StoreError(f"cannot write to {directory}: {error.strerror or error} ({where})") from error


def _bring(
    http: httpx.Client,
    urls: _Urls,
    files: Sequence[File],
    directory: Path,
    on_progress: Callable[[int, int], None] | None,
    on_repair: Callable[[str], None] | None,
) -> None:
    meter = _Meter(sum(file.size for file in files), on_progress)

    def fetch(file: File) -> None:
        _Fetch(http, urls, directory, file, meter, on_repair).run()

    early = sorted((file for file in files if file.name != INDEX), key=lambda file: -file.size)
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="download")
    try:
        for finished in as_completed([pool.submit(fetch, file) for file in early]):
            finished.result()
    except BaseException:
        meter.stopped.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for file in files:
        if file.name == INDEX:
            fetch(file)


class _StoppedError(Exception):
    """Another file failed, or the user gave up; what has come stays for the next time."""


class _Meter:
    """Bytes that are here, of all files together."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._done = 0
        self._total = total
        self._report = report

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._report is not None:
                self._report(self._done, self._total)


class _Urls:
    """Where the files are. Presigned URLs run out, and are asked for again then."""

    def __init__(
        self, base_url: str, list_files: Callable[[], Sequence[File]], files: Sequence[File]
    ) -> None:
        self._base = base_url
        self._list = list_files
        self._lock = threading.Lock()
        self._known = {file.name: file.url for file in files}

    def of(self, file: File) -> str:
        with self._lock:
            url = self._known[file.name]
        parts = urlsplit(url)
        # Behind a proxy the API does not know its own address: ours has just worked
        own = parts.path.endswith(f"/files/{parts.path.rpartition('/')[2]}") and "/v1/merges/" in parts.path
        if own and not parts.query:
            return self._base + parts.path[parts.path.index("/v1/merges/") :]
        return url

    def renew(self) -> None:
        found = {file.name: file.url for file in self._list()}
        with self._lock:
            self._known |= found


class _Fetch:
    """One file: into a ``.part`` file that is named for the content, so that it is only gone on with for the same."""

    def __init__(
        self,
        http: httpx.Client,
        urls: _Urls,
        directory: Path,
        file: File,
        meter: _Meter,
        on_repair: Callable[[str], None] | None,
    ) -> None:
        self._http = http
        self._urls = urls
        self._file = file
        self._meter = meter
        self._on_repair = on_repair
        self._counted = 0
        self._target = directory / file.name
        self._part = directory / f"{file.name}.{file.digest.rpartition(':')[2][:12]}.part"

    def run(self) -> None:
        if self._is_here():
            self._count(self._file.size)
            return
        if self._target.exists() and self._on_repair is not None:
            self._on_repair(self._file.name)
        resumed = self._part.exists()
        self._bring()
        try:
            self._verify()
        except StoreError:
            if not resumed:
                raise
            self._bring()  # what was left behind was not what it seemed
            self._verify()
        self._part.replace(self._target)

    def _verify(self) -> None:
        """Check what came; nothing is left of it when it is wrong."""
        try:
            verify(self._part, self._file.size, self._file.digest)
        except StoreError:
            self._part.unlink()
            raise

    def _is_here(self) -> bool:
        if not self._target.is_file():
            return False
        try:
            verify(self._target, self._file.size, self._file.digest)
        except StoreError:
            return False
        return True

    def _count(self, position: int) -> None:
        self._meter.add(position - self._counted)
        self._counted = position

    def _bring(self) -> None:
        """Ask until everything is here; only attempts that bring nothing are counted."""
        failures = 0
        while True:
            before = self._counted
            try:
                self._attempt()
            except (httpx.TransportError, StoreUnavailableError, TruncatedReadError) as error:
                failures = 0 if self._counted > before else failures + 1
                if failures == ATTEMPTS:
                    raise StoreUnavailableError(f"{self._file.name} cannot be downloaded: {error}") from error
                if self._meter.stopped.wait(WAIT_S * 2**failures):
                    raise _StoppedError from error
            else:
                return

    def _attempt(self) -> None:
        have = self._part.stat().st_size if self._part.exists() else 0
        if have > self._file.size:
            self._part.unlink()
            have = 0
        self._count(have)
        if have == self._file.size:
            self._part.touch()
            return
        headers = {"Range": f"bytes={have}-"} if have else {}
        url = self._urls.of(self._file)
        with self._http.stream("GET", url, headers=headers, follow_redirects=True) as response:
            self._check(response)
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                have = 0  # it does not do ranges
            self._check_length(have, response.headers.get("Content-Length"))
            with self._part.open("r+b" if have else "wb") as out:
                out.seek(have)
                for data in response.iter_bytes():  # as they come: what a bigger step gathers, an error loses
                    if self._meter.stopped.is_set():
                        raise _StoppedError
                    out.write(data)
                    have += len(data)
                    if have > self._file.size:
                        break
                    self._count(have)
                out.flush()
                os.fsync(out.fileno())
        if have > self._file.size:
            self._part.unlink()
            self._check_length(0, str(have))
        if have < self._file.size:
            raise TruncatedReadError(f"{self._file.name}: {have} of {self._file.size} bytes came")

    def _check_length(self, have: int, left: str | None) -> None:
        """Refuse what is longer than what the merge wrote, before any of it is kept."""
        size = self._file.size
        if left is not None and left.isdecimal() and have + int(left) > size:
            raise OutputReplacedError(
                f"{self._file.name}: the store has {have + int(left)} bytes, the merge wrote {size}: "
                "the output was replaced since"
            )

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        if response.status_code == httpx.codes.GONE:
            raise OutputReplacedError(f"{self._file.name}: {_detail(response)}")
        status, name = response.status_code, self._file.name
        if status == httpx.codes.FORBIDDEN:
            self._urls.renew()
            raise StoreUnavailableError(f"{name}: the store refuses the URL; it may have expired")
        if status >= 500 or status == httpx.codes.TOO_MANY_REQUESTS:
            raise StoreUnavailableError(f"{name}: the store answered {status}")
        if status == httpx.codes.NOT_FOUND:
            raise ObjectNotFoundError(f"{name} is not there any more")
        if status == httpx.codes.UNAUTHORIZED:
            raise AccessDeniedError(f"{name}: the store wants credentials")
        raise StoreError(f"{name}: the store answered {status}")


def _detail(response: httpx.Response) -> str:
    """What a problem says."""
    response.read()
    try:
        return str(response.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return "the output was replaced since"


def _check_place(directory: Path, names: Container[str]) -> None:
    """Weights of another model in the directory would be mixed with these, or loaded in their place."""
    strange = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in names)
    if strange:
        raise AlreadyExistsError(
            f"{directory} holds the weights of another model ({', '.join(strange[:3])}): choose another directory"
        )


def _check_name(name: str) -> None:
    """A listing must not write outside of the directory."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise StoreError(f"the service lists a file named {name!r}, which is no plain name")
