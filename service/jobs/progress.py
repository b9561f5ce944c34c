"""How far a job is, alike in Redis, over the wire and at the client, who needs nothing but Python for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    __pydantic_config__: ClassVar = {
        "use_attribute_docstrings": True,
        "json_schema_serialization_defaults_required": True,
    }

    bytes_done: int = 0
    """Output bytes in finished parts."""
    bytes_total: int = 0
    """Output bytes of all parts; 0 until the job is planned."""
    bytes_read: int = 0
    """Input bytes read so far."""
    parts_done: int = 0
    """Finished parts."""
    parts_total: int = 0
    """All parts."""
    surveys_done: int = 0
    """Finished survey passes."""
    surveys_total: int = 0
    """All survey passes."""

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read what the API says; keys of a newer API are passed over."""
        return cls(**{item.name: int(body[item.name]) for item in fields(cls) if item.name in body})
