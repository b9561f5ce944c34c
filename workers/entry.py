"""What a fleet calls by name: ``module:function`` is the whole interface, JSON in and JSON out.

Tasks and results travel as JSON text within it: read without a tree of dictionaries in between, which for a
part of thousands of small tensors would be most of a worker's memory.
"""

from __future__ import annotations

import logging
import traceback
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

from workers import logs, tracing
from workers.arena import Arena, padded
from workers.errors import FleetError, MergemillError
from workers.kernels import kernels_of, pin_of
from workers.run import PartRun, SurveyRun, reset_peak_bytes, run_tasks
from workers.stages import Task, Tools
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore, Upload
from workers.task import PART, SURVEY_TASK, JSONValue, canonical_json

log = logging.getLogger(__name__)


def tasks(payloads: Sequence[JSONValue]) -> Iterator[tuple[int, JSONValue | MergemillError]]:
    """Do tasks, of which each is read while the one before is merged; yields their numbers and values as they are done.

    A payload is ``{"part", "upload": {"uri", "id"}, "facts"}``, whose value is the JSON text of a ``PartResult``, or
    ``{"survey"}``, whose value is the pass's summary; and ``{"store", "device", "arena_bytes"}``, the same for all.
    ``{"ids"}`` of any are named in its logs, and ``{"known"}`` lists URI, start, end and the SHA-256 of each block, in
    base64, of what it reads and is known before.
    """
    logs.configure()
    tracing.configure("worker")
    shared = payloads[0]
    with _ARENA.of(shared["arena_bytes"], shared["device"]) as arena:
        tools = Tools(_store(canonical_json(shared["store"])), arena, kernels_of(shared["device"]))
        for number, outcome in run_tasks([partial(_task, payload, tools) for payload in payloads]):
            if isinstance(outcome, Exception):
                ids = payloads[number].get("ids", {})
                log.warning("task failed: %s: %s", type(outcome).__name__, outcome, extra=ids)
            yield number, _value(outcome)


def _task(payload: JSONValue, tools: Tools) -> Task:
    ids = payload.get("ids", {})
    logs.about(ids)
    tracing.adopt(ids.get("traceparent"))
    known = {(uri, start, end): b64decode(text) for uri, start, end, text in payload.get("known", ())}
    if "survey" in payload:
        return SurveyRun(SURVEY_TASK.validate_json(payload["survey"]), tools, known)
    upload = Upload(payload["upload"]["uri"], payload["upload"]["id"])
    return PartRun(PART.validate_json(payload["part"]), upload, payload["facts"], tools, known)


def _value(outcome: Task | Exception) -> JSONValue | MergemillError:
    if isinstance(outcome, MergemillError):
        return outcome
    if isinstance(outcome, Exception):
        return FleetError("a task failed: " + "".join(traceback.format_exception(outcome)[-3:]).strip())
    return outcome.value


@lru_cache(maxsize=8)
def _store(settings: str) -> ObjectStore:
    return open_stores(StoreSettings.model_validate_json(settings))


class _Kept:
    """The process' arena: one for all jobs, of the size that each wants, as long as they want the same device."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._device = ""

    @contextmanager
    def of(self, nbytes: int, device: str) -> Iterator[Arena]:
        if self._arena is None or (self._arena.nbytes, self._device) != (padded(nbytes), device):
            self._arena = self._changed(nbytes, device)
            self._device = device
            reset_peak_bytes()
        try:
            yield self._arena
        finally:
            self._arena.rest()

    def _changed(self, nbytes: int, device: str) -> Arena:
        """One of another size: with the memory that is there, which is cheaper than fresh memory, where that can be."""
        kept, self._arena = self._arena, None
        if kept is not None and device == self._device and kept.resize(nbytes):
            return kept
        del kept  # before there is another
        return Arena(nbytes, pin_of(device))


_ARENA = _Kept()
