"""The functions that a fleet calls by name: JSON in, JSON out. ``module:function`` is their whole interface."""

from __future__ import annotations

from functools import lru_cache

from workers.run import run_part, run_survey
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore, Upload
from workers.task import PART, PART_RESULT, SURVEY_TASK, JSONValue, canonical_json

PART_ENTRY = "workers.entry:part"
SURVEY_ENTRY = "workers.entry:survey"


def part(payload: JSONValue) -> JSONValue:
    """Make a part: ``{"part", "upload": {"uri", "id"}, "facts", "store"}`` to the JSON of a ``PartResult``."""
    upload = Upload(payload["upload"]["uri"], payload["upload"]["id"])
    result = run_part(
        PART.validate_python(payload["part"]), upload, payload["facts"], _store(payload["store"])
    )
    return PART_RESULT.dump_python(result, mode="json")


def survey(payload: JSONValue) -> JSONValue:
    """Summarise a piece of a survey: ``{"task", "store"}`` to the pass's summary."""
    return run_survey(SURVEY_TASK.validate_python(payload["task"]), _store(payload["store"]))


def _store(settings: JSONValue) -> ObjectStore:
    return _opened(canonical_json(settings))


@lru_cache(maxsize=8)
def _opened(settings: str) -> ObjectStore:
    return open_stores(StoreSettings.model_validate_json(settings))
