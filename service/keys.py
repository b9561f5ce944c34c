"""API keys: who may ask for what, and for which places. Pure.

A key's token is ``mm_<id>_<secret>``. The secret is 256 random bits, and only its SHA-256 is kept: what a slow
hash protects are secrets that somebody could guess, and nobody guesses these, however fast a guess can be tried.
Keys do not change but for being revoked: what a key was allowed when it was made is what it is allowed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from workers.errors import StoreError
from workers.store.uris import normalise

EVERYWHERE: Final = "*"
"""The prefix that every place lies in."""

HUB: Final = "hub:"
"""Among a key's inputs: every hub name that the setting ``model_roots`` maps to a place."""

_ID = "[0-9abcdefghjkmnpqrstvwxyz]{12}"
_TOKEN = re.compile(f"mm_({_ID})_([0-9a-f]{{64}})")
_NO_DIGEST = "0" * 64


class Scope(StrEnum):
    """What a key may be used for."""

    READ = "read"
    """Look at jobs of its own, and download what they made."""
    SUBMIT = "submit"
    """Plan, submit and cancel merges."""
    ADMIN = "admin"
    """Both, with everybody's jobs."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Frozen):
    """What one key may use; 0 is without limit."""

    requests_per_second: float = Field(default=50.0, ge=0)
    """Requests a second, over time; :data:`BURST_S` seconds' worth of them may come at once."""
    queued_jobs: int = Field(default=1000, ge=0)
    """Jobs that wait to be begun."""
    running_jobs: int = Field(default=0, ge=0)
    """Jobs that run at once; more of them wait."""
    input_bytes: int = Field(default=0, ge=0)
    """Bytes of the input tensors of one job, counted once."""

    def with_own(self, own: Mapping[str, float]) -> Self:
        """These, with some of them replaced.

        :raises ValueError: there is no such limit, or its value is out of range.
        """
        return self.model_validate({**self.model_dump(), **own})


BURST_S: Final = 2
"""Seconds whose requests may come at once."""


def _checked_limits(own: Mapping[str, float]) -> Mapping[str, float]:
    Limits().with_own(own)
    return own


def _prefix(text: str, of_inputs: bool) -> str:
    if text == EVERYWHERE or (text == HUB and of_inputs):
        return text
    if "*" in text:
        raise ValueError(
            f"{text!r}: a prefix is whole path segments, without wildcards; `*` alone is every place"
        )
    try:
        return normalise(text)
    except StoreError as error:
        raise ValueError(str(error)) from error


class Access(_Frozen):
    """Where a job may read and write: what its key allowed when it was submitted."""

    inputs: tuple[str, ...]
    """URI prefixes that it may read."""
    outputs: tuple[str, ...]
    """URI prefixes that it may write."""
    mapped: tuple[str, ...] = ()
    """Models that it may read because the operator maps their hub names to there."""
    input_bytes: int = Field(default=0, ge=0)
    """Most bytes of its input tensors; 0 is any number."""


class ApiKey(_Frozen):
    """A key, without its secret."""

    id: str = Field(pattern=f"^{_ID}$")
    """Its id: public, and part of the token."""
    name: str = Field(min_length=1, max_length=100)
    """Whose it is, for people."""
    scopes: tuple[Scope, ...] = Field(min_length=1)
    """What it may be used for."""
    inputs: tuple[str, ...] = ()
    """Normalised URI prefixes that its jobs may read; ``*`` is every place, and ``hub:`` all hub names."""
    outputs: tuple[str, ...] = ()
    """Normalised URI prefixes that its jobs may write, or ``*``."""
    limits: Annotated[Mapping[str, float], AfterValidator(_checked_limits)] = {}
    """Those of :class:`Limits` in which it differs from the service's."""
    digest: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    """SHA-256 of the secret, in hex."""
    created_at: float
    """When it was made, in Unix seconds."""
    expires_at: float | None = None
    """When it ends, in Unix seconds."""
    revoked_at: float | None = None
    """When it was revoked, in Unix seconds."""
    used_at: float | None = None
    """When it was last used, in Unix seconds, to the minute."""

    @field_validator("inputs", "outputs")
    @classmethod
    def _normal(cls, prefixes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_prefix(prefix, info.field_name == "inputs") for prefix in prefixes))

    def allows(self, scope: Scope) -> bool:
        """Whether it may be used for this."""
        return scope in self.scopes or self.is_admin

    @property
    def is_admin(self) -> bool:
        """Whether everybody's jobs are its business."""
        return Scope.ADMIN in self.scopes

    def ended(self, now: float) -> str | None:
        """Why it is no good any more, if so."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "has expired"
        return None


ANYBODY: Final = ApiKey(
    id="0" * 12,
    name="anybody",
    scopes=(Scope.ADMIN,),
    inputs=(EVERYWHERE,),
    outputs=(EVERYWHERE,),
    limits=dict.fromkeys(Limits.model_fields, 0),
    digest=_NO_DIGEST,
    created_at=0,
)
"""Whoever asks, where authentication is off."""


def new_key(
    name: str,
    scopes: Iterable[Scope],
    now: float,
    *,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    limits: Mapping[str, float] | None = None,
    lasts_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A key and its token, which nobody can tell again.

    :param lasts_s: seconds until it expires; ``None`` is never.
    :raises ValueError: something about it cannot be.
    """
    secret = secrets.token_hex(32)
    key = ApiKey(
        id="".join(secrets.choice("0123456789abcdefghjkmnpqrstvwxyz") for _ in range(12)),
        name=name,
        scopes=tuple(sorted(set(scopes))),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        limits=limits or {},
        digest=_digest(secret),
        created_at=now,
        expires_at=None if lasts_s is None else now + lasts_s,
    )
    return key, f"mm_{key.id}_{secret}"


def split_token(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token; ``None`` when it is none."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else (found[1], found[2])


def is_secret_of(secret: str, key: ApiKey | None) -> bool:
    """Whether this is the key's secret; that there is no such key takes as long to find out."""
    expected = _NO_DIGEST if key is None else key.digest
    return hmac.compare_digest(_digest(secret), expected) and key is not None


def lies_in(uri: str, prefixes: Iterable[str]) -> bool:
    """Whether a place lies in one of these normalised prefixes, by its name; what is no place lies nowhere.

    >>> lies_in("s3://bucket/team/run", ["s3://bucket/team"])
    True
    >>> lies_in("s3://bucket/team2", ["s3://bucket/team"])
    False
    """
    try:
        whole = normalise(uri)
    except StoreError:
        return False
    return any(
        prefix in (EVERYWHERE, whole) or whole.startswith(prefix if prefix.endswith("/") else f"{prefix}/")
        for prefix in prefixes
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
