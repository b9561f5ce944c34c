"""The claim: an object beside an output that says which job writes there, and all that it takes to go on with it.

Whoever can write there can write one, so nothing in it is believed that would allow more than its reader does.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from service.jobs.record import JOB_ID, JobRecord
from service.jobs.transitions import Planned
from service.planning.checkpoint import HIDDEN, is_shard, is_staged
from workers.errors import DamagedClaimError, ObjectNotFoundError
from workers.store import ObjectStore, join, read_bytes
from workers.task import STAGED, JSONValue, canonical_json

CLAIM = f"{HIDDEN}/claim.json"


def _shard(name: str) -> str:
    if not is_shard(name) and not (is_staged(name) and name.startswith(STAGED)):
        raise ValueError(f"{name!r} is no name of a shard")
    return name


Shard = Annotated[str, AfterValidator(_shard)]


class Claim(BaseModel):
    """What a job says beside its output."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str = Field(pattern=f"^{JOB_ID.pattern}$")
    """Whose it is."""
    recipe: dict[str, JSONValue]
    """Its recipe."""
    options: dict[str, JSONValue] = {}
    """Its options."""
    seed: int = 0
    """The recipe's seed."""
    plan_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the plan's canonical JSON."""
    inputs: dict[str, dict[str, str]] = {}
    """ETags of the inputs' files, by checkpoint and name."""
    shards: tuple[Shard, ...]
    """Names of the shards that it makes."""
    uploads: dict[Shard, str] = {}
    """Upload id by shard, once all of them are open."""
    made: int = 0
    """How many directories were made for the output."""
    planned: Planned | None = None
    """What the record is told of the plan; not in claims of before."""
    key: str | None = None
    """Id of the API key that it was submitted with."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Its priority."""
    origin: dict[str, str] = {}
    """Where it came from, as in the record."""
    created_at: float | None = None
    """When it was submitted, in Unix seconds."""

    @classmethod
    def of(
        cls,
        record: JobRecord,
        planned: Planned,
        seed: int,
        inputs: dict[str, dict[str, str]],
        shards: tuple[str, ...],
    ) -> Claim:
        """What a job says before its uploads are open."""
        return cls(
            job=record.id,
            recipe=record.recipe,
            options=record.options,
            seed=seed,
            plan_digest=planned.plan_digest,
            inputs=inputs,
            shards=shards,
            planned=planned,
            key=record.key,
            priority=record.priority,
            origin=record.origin,
            created_at=record.created_at,
        )

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return canonical_json(self.model_dump(mode="json")).encode()


def read_claim(store: ObjectStore, output: str) -> Claim | None:
    """The claim at an output; ``None`` where there is none.

    :raises DamagedClaimError: it cannot be read.
    :raises StoreError: the store does not tell.
    """
    uri = join(output, CLAIM)
    try:
        found = json.loads(read_bytes(store, uri))
        return Claim.model_validate(found)
    except ObjectNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        what = f"{error.error_count()} fields are wrong" if isinstance(error, ValidationError) else error
        raise DamagedClaimError(
            f"{uri} is no claim that can be read ({what}): if no job writes to {output}, delete it, and the "
            "parts of uploads that are open there"
        ) from error
