"""The functions that a fleet calls by name: JSON in, JSON out. ``module:function`` is their whole interface.

Tasks and results travel as JSON text within it: read without a tree of dictionaries in between, which for a
part of thousands of small tensors would be most of a worker's memory.
"""

from __future__ import annotations

from functools import lru_cache

from workers.run import run_part, run_survey
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore, Upload
from workers.task import PART, PART_RESULT, SURVEY_TASK, JSONValue, canonical_json

PART_ENTRY = "workers.entry:part"
SURVEY_ENTRY = "workers.entry:survey"


def part(payload: JSONValue) -> JSONValue:
    """Make a part: ``{"part", "upload": {"uri", "id"}, "facts", "store", "device"}`` to a ``PartResult``."""
    upload = Upload(payload["upload"]["uri"], payload["upload"]["id"])
    wanted, store = PART.validate_json(payload["part"]), _store(payload["store"])
    result = run_part(wanted, upload, payload["facts"], store, payload["device"])
    return PART_RESULT.dump_json(result).decode()


def survey(payload: JSONValue) -> JSONValue:
    """Summarise a piece of a survey: ``{"task", "store", "device"}`` to the pass's summary."""
    task = SURVEY_TASK.validate_json(payload["task"])
    return run_survey(task, _store(payload["store"]), payload["device"])


def _store(settings: JSONValue) -> ObjectStore:
    return _opened(canonical_json(settings))


@lru_cache(maxsize=8)
def _opened(settings: str) -> ObjectStore:
    return open_stores(StoreSettings.model_validate_json(settings))
