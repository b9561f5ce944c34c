"""The records of finished parts beside the output, for when Redis is lost.

They lie in pages of neighbouring parts, and only pages with something new are written: parts are made about in
order, so a job of ten thousand writes as little each time as one of a hundred.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import structlog

from service.planning.checkpoint import HIDDEN
from service.planning.plan import Plan
from service.running.commit import Output
from workers.errors import ObjectNotFoundError
from workers.store import ObjectStore, join, read_bytes
from workers.task import PART_RESULT, PartResult, canonical_json

PREFIX = f"{HIDDEN}/progress-"

PAGE_PARTS = 128
"""Parts whose records lie in one object."""

log = structlog.get_logger(__name__)


class Progress:
    """The finished parts of one job, as far as they are known here."""

    def __init__(self, output: Output, plan: Plan, uploads: Mapping[str, str]) -> None:
        self._output = output
        self._digest = plan.digest
        self._uploads = uploads
        ids = (identity for each in plan.whole for identity in each.part_ids)
        self._page_of = {identity: index // PAGE_PARTS for index, identity in enumerate(ids)}
        self._pages: dict[int, dict[str, PartResult]] = {}
        self._unsaved: set[int] = set()

    @property
    def is_saved(self) -> bool:
        """Whether there is nothing to write."""
        return not self._unsaved

    def add(self, result: PartResult) -> None:
        """A part is finished."""
        page = self._page_of[result.part]
        self._pages.setdefault(page, {})[result.part] = result
        self._unsaved.add(page)

    def load(self) -> dict[str, PartResult]:
        """The parts that were written, if they belong to this plan and these uploads; they count as saved."""
        store, uri, job = self._output.store, self._output.uri, self._output.job
        found = {result.part: result for result in saved_parts(store, uri, job, self._digest, self._uploads)}
        for part in found.keys() - self._page_of.keys():
            del found[part]
        for result in found.values():
            self._pages.setdefault(self._page_of[result.part], {})[result.part] = result
        return found

    def save(self) -> None:
        """Write what is new since the last time."""
        envelope = _envelope(self._output.job, self._digest, self._uploads)
        for page in sorted(self._unsaved):
            parts = [PART_RESULT.dump_python(each, mode="json") for each in self._pages[page].values()]
            self._output.put(f"{PREFIX}{page:05}.json", canonical_json({**envelope, "parts": parts}).encode())
            self._unsaved.remove(page)


def saved_parts(
    store: ObjectStore, output: str, job: str, plan_digest: str, uploads: Mapping[str, str]
) -> list[PartResult]:
    """The parts that were written for a job, of this plan and in these uploads, each once.

    Pages of anything else, and those that cannot be read, count for nothing: their parts are made again.
    """
    found: dict[str, PartResult] = {}
    for info in store.list(join(output, PREFIX)):
        try:
            body = json.loads(read_bytes(store, info.uri))
            parts = body.pop("parts")
            if body == _envelope(job, plan_digest, uploads):
                results = [PART_RESULT.validate_python(part) for part in parts]
                found |= {result.part: result for result in results}
        except ObjectNotFoundError:  # a paused scheduler's, which went since
            continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("finished parts cannot be read", uri=info.uri, error=str(error))
    return list(found.values())


def _envelope(job: str, plan_digest: str, uploads: Mapping[str, str]) -> dict[str, object]:
    """Whose parts they are."""
    return {"job": job, "plan_digest": plan_digest, "uploads": dict(uploads)}
