"""What a deployment sets, by environment variables with the prefix ``MERGEMILL_``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.keys import Limits
from service.plan import PlanOptions
from service.price import BASELINE_BYTES
from workers.store import StoreSettings


class Settings(BaseSettings):
    """Settings of the API and the scheduler. Nested ones take ``__``: ``MERGEMILL_STORE__S3_ENDPOINT_URL``."""

    model_config = SettingsConfigDict(
        env_prefix="MERGEMILL_", env_nested_delimiter="__", frozen=True, extra="ignore", populate_by_name=True
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    """Redis >= 7.0 or Valkey, with `appendfsync always` and `noeviction`."""
    namespace: str = "mergemill"
    """Prefix of every key in Redis."""
    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port that the API listens on."""
    auth: Literal["keys", "off"] = "keys"
    """Whether requests need an API key (`mergemill keys create`); `off` is for loopback alone."""
    limits: Limits = Limits()
    """What each API key may use, where it has no limits of its own; 0 is without limit."""
    ray_address: str | None = Field(
        default=None, validation_alias=AliasChoices("MERGEMILL_RAY_ADDRESS", "RAY_ADDRESS", "ray_address")
    )
    """A Ray cluster to connect to; without one a local Ray is started."""
    ray_cpus: int | None = Field(default=None, ge=1)
    """CPUs that a local Ray offers; all of the machine's by default."""
    gpu_memory_bytes: int = Field(default=0, ge=0)
    """Memory of each of the cluster's GPUs: tasks compute there and take their share of it; 0 computes on the CPU."""
    state_dir: Path = Path("~/.mergemill")
    """Where the embedded stack keeps its state and logs."""
    model_roots: dict[str, str] = {}
    """Where hub names are: `{"org/name": "s3://bucket/prefix"}`, or a prefix of names ending in `/` (or `""`)."""
    store: StoreSettings = StoreSettings()
    """How to reach object storage."""
    worker_memory_bytes: int = Field(default=PlanOptions().worker_memory_bytes, ge=1)
    """Most memory of one worker process, everything included."""
    worker_baseline_bytes: int = Field(default=BASELINE_BYTES, ge=0)
    """Memory of a worker process that has done nothing yet; part of every price."""
    max_running_jobs: int = Field(default=4, ge=1)
    """Jobs that one scheduler runs at once."""
    max_running_jobs_total: int = Field(default=0, ge=0)
    """Jobs that all schedulers together run at once; give all of them the same. 0 is any number."""
    max_parts_in_flight: int = Field(default=1024, ge=1)
    """Part tasks of one job that are handed to Ray at once; Ray runs as many as fit."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """How long a scheduler owns a job without a sign of life."""
    poll_seconds: float = Field(default=0.1, gt=0)
    """How often a scheduler looks for work and for cancelled jobs."""
    progress_seconds: float = Field(default=5.0, gt=0)
    """How often finished parts are also written beside the output, in case Redis is lost."""
    presign_seconds: int = Field(default=3600, ge=1, le=604800)
    """How long a presigned download URL works."""
    log_format: str = Field(default="auto", pattern="^(auto|json|console)$")
    """`json`, `console`, or `auto`: console on a terminal."""

    @property
    def default_options(self) -> PlanOptions:
        """Plan options of a job that sets none."""
        return PlanOptions(worker_memory_bytes=self.worker_memory_bytes)
