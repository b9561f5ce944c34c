"""What a deployment sets, by environment variables with the prefix ``MERGEMILL_``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.keys import Limits
from service.planning.plan import PlanOptions
from service.planning.price import BASELINE_BYTES
from service.webhooks.addresses import Destinations
from service.webhooks.webhooks import read_secret
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
    """How often an idle scheduler looks for work."""
    progress_seconds: float = Field(default=5.0, gt=0)
    """How often finished parts are also written beside the output, in case Redis is lost."""
    outage_seconds: float = Field(default=5.0, ge=0)
    """How long a job waits before it goes on when the store is out of reach; the second wait is twice as long."""
    retention_seconds: float = Field(default=30 * 86400.0, ge=0)
    """How long jobs that have ended are kept, with their events and deliveries; 0 is for ever. Outputs stay."""
    abandoned_seconds: float = Field(default=86400.0, gt=0)
    """After how long an upload at the output of a job that has ended counts as abandoned, and is aborted."""
    sweep_seconds: float = Field(default=10.0, gt=0)
    """How often one of the schedulers looks for what is to be cleared away."""
    presign_seconds: int = Field(default=3600, ge=1, le=604800)
    """How long a presigned download URL works."""
    idempotency_seconds: float = Field(default=86400.0, gt=0)
    """How long an `Idempotency-Key` is remembered."""
    webhook_secret: SecretStr | None = None
    """Signs webhooks that bring no secret of their own: `whsec_` and 24 to 64 random bytes in base64."""
    webhook_allow_private: tuple[str, ...] = ()
    """Addresses, CIDRs and hosts that webhooks may reach though they are not public, also by http: `["10.0.0.0/8"]`."""
    log_format: str = Field(default="auto", pattern="^(auto|json|console)$")
    """`json`, `console`, or `auto`: console on a terminal."""
    metrics_host: str = "127.0.0.1"
    """Address that a scheduler shows its metrics on."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Port that a scheduler shows its metrics on; 0 is a free one, which its log names."""
    metrics_token: SecretStr | None = None
    """Who may read metrics, the API's too, from another machine; without it only this machine may."""

    @property
    def busy_poll_seconds(self) -> float:
        """How often a scheduler that runs a job looks whether it is cancelled, and for others to run beside it.

        A look costs half a millisecond of CPU time, which ten a second would make half a per cent of a job.
        """
        return 5 * self.poll_seconds

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            read_secret(value.get_secret_value())
        return value

    @field_validator("webhook_allow_private")
    @classmethod
    def _are_places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        Destinations.parse(value)
        return value

    @property
    def webhook_destinations(self) -> Destinations:
        """Where webhooks may go."""
        return Destinations.parse(self.webhook_allow_private)

    @property
    def default_options(self) -> PlanOptions:
        """Plan options of a job that sets none."""
        return PlanOptions(worker_memory_bytes=self.worker_memory_bytes)

    def served(self) -> Self:
        """The settings of a process that works for others: no ``file:`` directory but those that are named."""
        if self.store.file_roots is not None:
            return self
        return self.model_copy(update={"store": self.store.model_copy(update={"file_roots": ()})})
