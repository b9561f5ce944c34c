"""The records of finished parts beside the output, for when Redis is lost.

They lie in pages of neighbouring parts, and only pages with something new are written: parts are made about in
order, so a job of ten thousand writes as little each time as one of a hundred.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from service.claim import HIDDEN
from service.commit import Output
from service.plan import Plan
from workers.errors import ObjectNotFoundError
from workers.store.uris import join
from workers.task import PART_RESULT, PartResult, canonical_json

PREFIX = f"{HIDDEN}/progress-"

PAGE_PARTS = 128
"""Parts whose records lie in one object."""


class Progress:
    """The finished parts of one job, as far as they are known here."""

    def __init__(self, output: Output, plan: Plan, uploads: Mapping[str, str]) -> None:
        self._output = output
        self._envelope = {"job": output.job, "plan_digest": plan.digest, "uploads": dict(uploads)}
        self._page_of = {identity: index // PAGE_PARTS for index, identity in enumerate(plan.part_ids)}
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
        found: dict[str, PartResult] = {}
        for info in self._output.store.list(join(self._output.uri, PREFIX)):
            try:
                body = json.loads(self._output.read(info.uri))
            except ObjectNotFoundError:  # a paused scheduler's, which went since
                continue
            parts = body.pop("parts")
            if body == self._envelope:
                results = [PART_RESULT.validate_python(part) for part in parts]
                found |= {result.part: result for result in results}
        for result in found.values():
            self._pages.setdefault(self._page_of[result.part], {})[result.part] = result
        return found

    def save(self) -> None:
        """Write what is new since the last time."""
        for page in sorted(self._unsaved):
            parts = [PART_RESULT.dump_python(each, mode="json") for each in self._pages[page].values()]
            body = {**self._envelope, "parts": parts}
            self._output.put(f"{PREFIX}{page:05}.json", canonical_json(body).encode())
            self._unsaved.remove(page)
