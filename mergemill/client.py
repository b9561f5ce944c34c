"""The Python client: Mergemill's REST API, and nothing of the service behind it."""

from __future__ import annotations

import builtins
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import httpx

from mergemill import download, recipes
from mergemill.credentials import BearerAuth
from mergemill.events import Event, Follower, is_passing, stream
from mergemill.jobs import File, Job, JobPage
from mergemill.problems import problem_of, unreachable
from workers.errors import (
    IdempotencyKeyError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobStoreUnavailableError,
    JobTimeoutError,
    MergemillError,
    RecipeError,
    ServiceUnavailableError,
    TooManyRequestsError,
    from_json,
)

DEFAULT_URL = "http://127.0.0.1:8080"
"""Where ``mergemill up`` listens."""

POLL_S = (0.1, 1.0)
"""Shortest and longest time between two looks at a job, in seconds; in between, a tenth of the time waited."""

SUBMIT_RETRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Pauses before :meth:`Client.submit` asks again when no answer came, in seconds."""

PATIENCE_S = 60.0
"""How long :meth:`Client.wait` bears with an API that does not answer (it may be restarted), in seconds."""


class Client:
    """A Mergemill service. Thread safe; may be used as a context manager, which closes its connections.

    All methods raise :class:`workers.errors.MergemillError`: the service's own errors under their own
    classes (:class:`~workers.errors.RecipeError` with all its ``problems``,
    :class:`~workers.errors.JobNotFoundError`, :class:`~workers.errors.ConflictError`, …), and
    :class:`~workers.errors.ServiceUnavailableError` when nobody answers.

    :param url: the service's address; else ``MERGEMILL_URL``; else :data:`DEFAULT_URL`.
    :param api_key: the key to ask with; else ``MERGEMILL_API_KEY``. It is sent to the service alone.
    :param timeout: how long one request may take to connect, or to go on, in seconds.
    :param transport: what carries the requests, for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = (url or os.environ.get("MERGEMILL_URL") or DEFAULT_URL).rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise MergemillError(f"{self.url!r} is not the address of a service; write http://host:port")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=timeout,
            transport=transport,
            headers={"Accept-Encoding": "identity"},
            auth=BearerAuth(self.url, api_key or os.environ.get("MERGEMILL_API_KEY")),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def submit(
        self,
        recipe: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        output: str,
        *,
        idempotency_key: str | None = None,
        webhook: Mapping[str, Any] | None = None,
        priority: int = 0,
        **options: Any,
    ) -> Job:
        """Have a merge queued; once, also where the service's answer is lost and it has to be asked again.

        :param recipe: mergekit's YAML, or the same as a mapping; of several documents a list of them.
        :param output: ``s3://bucket/prefix`` or ``file:///directory`` (on the service's machine).
        :param idempotency_key: the same key and request again, within a day, are the same job; a fresh UUID if
            left out.
        :param webhook: who is to be told: ``url``, and if wanted ``events`` and ``secret`` (see docs/rest.md).
        :param priority: -100 to 100; jobs of a higher one are begun first. Above 0 it takes an admin's key.
        :param options: ``shard_bytes``, ``part_bytes``, ``whole_tensor_bytes``, ``worker_memory_bytes``,
            ``overwrite``, ``allow_nonfinite``; what is ``None`` or left out is the service's default.
        :raises RecipeError: the request is wrong; lists every problem.
        :raises ForbiddenError: the key may not have these places; ``problems`` names all of them.
        :raises TooManyRequestsError: as many of the key's jobs wait as may, or the inputs have too many bytes.
        :raises RequestTooLargeError: the recipe is longer than the service reads.
        :raises IdempotencyMismatchError: the key came with another request before.
        """
        body = _request(recipe, output, options) | ({} if webhook is None else {"webhook": dict(webhook)})
        body |= {"priority": priority} if priority else {}
        key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if not key.isascii() or not key.isprintable():  # no header could hold it
            raise IdempotencyKeyError("the idempotency key is not made of visible ASCII characters")
        for number, pause in enumerate((*SUBMIT_RETRIES_S, None)):
            try:
                return Job.from_json(self._post("/v1/merges", body, {"Idempotency-Key": key}))
            except (ServiceUnavailableError, JobStoreUnavailableError) as error:
                nobody = number == 0 and isinstance(error.__cause__, httpx.ConnectError)
                if pause is None or nobody:
                    raise
                time.sleep(pause)
        raise AssertionError  # the last try returns or raises

    def plan(
        self,
        recipe: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        output: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Plan and price a merge without running it: its digest, price, shards and notices.

        :raises RecipeError: the merge would fail; lists every problem of every model.
        """
        found: dict[str, Any] = self._post("/v1/plans", _request(recipe, output, options))
        return found

    def get(self, job: str) -> Job:
        """One job, as it is now.

        :raises JobNotFoundError: there is none.
        """
        return Job.from_json(self._get(f"/v1/merges/{_segment(job)}"))

    def list(self, limit: int = 50, cursor: str | None = None, state: str | None = None) -> JobPage:
        """A page of jobs, newest first.

        :raises CursorError: the cursor is not a page's.
        """
        asked = {"limit": limit, "cursor": cursor, "state": state}
        body = self._get("/v1/merges", {name: value for name, value in asked.items() if value is not None})
        return JobPage(tuple(map(Job.from_json, body["jobs"])), body["next_cursor"])

    def jobs(self, state: str | None = None) -> Iterator[Job]:
        """All jobs, newest first, fetched page by page."""
        cursor = None
        while True:
            page = self.list(200, cursor, state)
            yield from page.jobs
            cursor = page.next_cursor
            if cursor is None:
                return

    def cancel(self, job: str) -> Job:
        """Ask for a job's end; it is ``cancelled`` soon after.

        :raises JobError: it is committing, or has ended.
        """
        return Job.from_json(self._post(f"/v1/merges/{_segment(job)}/cancel", None))

    def delete(self, job: str) -> None:
        """Have a job forgotten that has ended, with its events and deliveries. What it wrote stays.

        :raises JobNotFoundError: there is none.
        :raises JobError: it has not ended, or is still being cleared up.
        """
        self._answer(self._http.build_request("DELETE", f"/v1/merges/{_segment(job)}"))

    def wait(
        self, job: str, on_progress: Callable[[Job], None] | None = None, timeout: float | None = None
    ) -> Job:
        """Wait until a job has succeeded: by its events, or by looking again and again where there are none.

        :param on_progress: called with the job whenever its state or progress has changed; ``print`` will do.
        :param timeout: the longest wait, in seconds.
        :raises JobFailedError: it failed (its own error is the ``__cause__``) or was cancelled.
        :raises JobTimeoutError: it has not ended in time.
        """
        on_progress = _on_change(on_progress)
        begun = heard = time.monotonic()
        with closing(Follower(self._http, f"/v1/merges/{_segment(job)}/events")) as follower:
            while True:
                found = None
                try:
                    found = self.get(job)
                except (ServiceUnavailableError, JobStoreUnavailableError, TooManyRequestsError):
                    if time.monotonic() - heard > PATIENCE_S:
                        raise
                else:
                    heard = time.monotonic()
                    on_progress(found)
                    if found.is_terminal:
                        return _succeeded(found)
                waited = time.monotonic() - begun
                left = None if timeout is None else timeout - waited
                if left is not None and left <= 0:
                    raise JobTimeoutError(f"{job} has not ended within {timeout:g} s")
                if found is None or not follower.listen(found, on_progress, left):
                    pause = min(max(POLL_S[0], waited / 10), POLL_S[1])
                    time.sleep(pause if left is None else min(pause, left))

    def events(self, job: str, after: str | None = None) -> Iterator[Event]:
        """What happens to a job, as it happens, from its beginning until its end.

        Where the connection breaks, or the service is started again, it goes on after the last event that came.

        :param after: id of an event: begin after it.
        :raises JobNotFoundError: there is no such job.
        :raises NoStreamError: the service, or a proxy before it, does not tell events.
        """
        heard, path = time.monotonic(), f"/v1/merges/{_segment(job)}/events"
        while True:
            came = False
            try:
                for event in stream(self._http, path, after):
                    heard = time.monotonic()
                    if event is None:
                        continue
                    came, after = True, event.id or after
                    yield event
                    if event.is_terminal:
                        return
                if not came and self.get(job).is_terminal:  # all had been told before
                    return
            except httpx.HTTPStatusError as error:
                if not is_passing(error.response):
                    raise problem_of(error.response) from error
            except httpx.HTTPError as error:
                if time.monotonic() - heard > PATIENCE_S:
                    raise unreachable(self.url, error) from error
            except (ServiceUnavailableError, JobStoreUnavailableError, TooManyRequestsError):
                if time.monotonic() - heard > PATIENCE_S:
                    raise
            time.sleep(POLL_S[0] if came else POLL_S[1])

    def files(self, job: str) -> builtins.list[File]:
        """The files of a merged checkpoint.

        :raises NotReadyError: the job has not succeeded.
        :raises OutputReplacedError: another job has written to the output since.
        """
        body = self._get(f"/v1/merges/{_segment(job)}/files")
        return [File(item["name"], item["size"], item["digest"], item["url"]) for item in body["files"]]

    def download(
        self,
        job: str,
        directory: str | Path,
        on_progress: Callable[[int, int], None] | None = None,
        on_repair: Callable[[str], None] | None = None,
    ) -> Path:
        """Download a merged checkpoint, several files at once, and check every digest.

        What an interrupted download left behind is used; what is already there is checked and kept. The
        index comes last, so that a checkpoint that can be loaded is whole.

        :param on_progress: called with the bytes that are here, and those of all files.
        :param on_repair: called with the name of each file that is there already, is not what the merge wrote, and
            is therefore replaced.
        :returns: the directory.
        :raises NotReadyError: the job has not succeeded.
        :raises OutputReplacedError: another job has written to the output since.
        :raises AlreadyExistsError: the directory holds the weights of another model.
        :raises StoreError: the store does not give a file, the bytes are not those of the merge, or the directory
            cannot be written.
        """
        place = Path(directory)
        download.download(self._http, self.url, lambda: self.files(job), place, on_progress, on_repair)
        return place

    def methods(self) -> builtins.list[dict[str, Any]]:
        """Every merge method, with the JSON schemas of its parameters."""
        found: builtins.list[dict[str, Any]] = self._get("/v1/methods")
        return found

    def ready(self) -> dict[str, Any]:
        """What the service says about its readiness: ``status``, ``missing`` and ``warnings``.

        :raises JobStoreUnavailableError: it cannot accept jobs now.
        """
        found: dict[str, Any] = self._get("/readyz")
        return found

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return self._answer(self._http.build_request("GET", path, params=params))

    def _post(
        self, path: str, body: Mapping[str, Any] | None, more_headers: Mapping[str, str] | None = None
    ) -> Any:
        if body is None:
            return self._answer(self._http.build_request("POST", path))
        try:
            content = json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the recipe cannot be written as JSON: {error}") from error
        headers = {"Content-Type": "application/json", **(more_headers or {})}
        return self._answer(self._http.build_request("POST", path, content=content, headers=headers))

    def _answer(self, request: httpx.Request) -> Any:
        try:
            response = self._http.send(request)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error
        if response.status_code == httpx.codes.NO_CONTENT:
            return None
        if response.is_success:
            try:
                return response.json()
            except ValueError as error:
                raise MergemillError(f"{request.url} does not speak Mergemill's REST API") from error
        raise problem_of(response)


def _request(
    recipe: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
    output: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    document = recipes.read(recipe) if isinstance(recipe, str) else recipes.as_mapping(recipe)
    given = {name: value for name, value in options.items() if value is not None}
    where = {} if output is None else {"output": output}
    return {"recipe": document, **where, "options": given}


def _on_change(call: Callable[[Job], None] | None) -> Callable[[Job], None]:
    """``call`` for a job that is not as it was the last time."""
    last: object = None

    def changed(job: Job) -> None:
        nonlocal last
        now = (job.state, job.cancel_requested, job.progress)
        if call is not None and now != last:
            call(job)
        last = now

    return changed


def _segment(job: str) -> str:
    if not job or not all(char.isascii() and (char.isalnum() or char in "-_") for char in job):
        raise JobNotFoundError(f"{job!r} is not the id of a job")
    return job


def _succeeded(job: Job) -> Job:
    if job.state == "succeeded":
        return job
    if job.state == "cancelled":
        raise JobCancelledError(f"{job.id} was cancelled")
    cause = from_json(dict(job.error or {"type": "MergemillError", "detail": "it does not say why"}))
    raise JobFailedError(f"{job.id} failed: {cause}") from cause
