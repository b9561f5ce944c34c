"""How to reach the stores."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from workers.errors import StoreError
from workers.ranges import READ_BYTES
from workers.store.uris import normalise, to_path


class StoreSettings(BaseModel):
    """How to reach the stores. What is ``None`` is left to boto3: environment, shared files, role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    s3_endpoint_url: str | None = None
    """URL of an S3 server that is not AWS."""
    s3_region: str | None = None
    """Region of the buckets."""
    s3_access_key_id: str | None = None
    """Access key id; needs the secret too."""
    s3_secret_access_key: SecretStr | None = None
    """Secret access key."""
    s3_session_token: SecretStr | None = None
    """Session token of temporary credentials."""
    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Bucket in the path or in the host name; servers without wildcard DNS need ``path``."""
    s3_checksums: Literal["when_supported", "when_required"] = "when_supported"
    """What guards parts on the way over https, beside TLS. ``when_supported``: a CRC32, and Content-MD5 from then
    on if the server is seen to ignore it; ``when_required``: the SHA-256 in the signature, for older servers (Ceph
    before 19, for one). Over http it is always the SHA-256."""
    s3_max_attempts: int = Field(default=8, ge=1)
    """How often a request is sent before the store counts as unavailable."""
    s3_retry_wait_s: float = Field(default=0.2, gt=0)
    """Longest wait before the second attempt, in seconds; it doubles each time, up to :attr:`s3_retry_wait_max_s`.
    The wait itself is random between nothing and that, and no shorter than a ``Retry-After`` that the store sends."""
    s3_retry_wait_max_s: float = Field(default=10.0, gt=0)
    """Longest wait between attempts, in seconds."""
    s3_retry_budget: int = Field(default=200, ge=0)
    """Retries that a process has in hand at most: each takes one, and it comes back when that helped; ten requests
    that succeed at once make up for one that did not. With none left nothing is sent again."""
    s3_connect_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds to wait for a connection."""
    s3_read_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for the next bytes of an answer."""
    s3_max_connections: int = Field(default=32, ge=1)
    """Connections kept open by one process."""
    s3_read_bytes: int = Field(default=READ_BYTES, ge=1 << 20)
    """Bigger reads are split into parallel requests of this many bytes."""
    s3_read_threads: int = Field(default=4, ge=1)
    """How many of those run at once in one process."""
    file_roots: tuple[str, ...] | None = None
    """Absolute directories that ``file:`` URIs may lie in, and nothing that links in them lead out to; ``None``: any
    that this process may use. ``mergemill serve`` and ``mergemill schedule`` take ``None`` for none at all."""
    file_direct_io: bool = True
    """Write the parts of ``file:`` uploads past the page cache, where the file system can."""
    file_lock_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for another process that is writing the same part of a ``file:`` upload."""

    @field_validator("file_roots")
    @classmethod
    def _as_paths(cls, roots: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Paths and ``file:`` URIs alike, as normalised paths; a ``StoreError`` is none of pydantic's errors."""
        try:
            return None if roots is None else tuple(to_path(normalise(root)) for root in roots)
        except StoreError as error:
            raise ValueError(str(error)) from error
