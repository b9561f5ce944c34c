"""Requests to S3: one client a process, bounded retries, and credentials that are looked up again when they run out."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import stamina
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workers.store import fence, s3_expiry
from workers.store.retries import RETRIES, RetryBudget, Tries
from workers.store.s3_errors import cause_of, is_expired, is_transient, retry_after_s, status_of, translated
from workers.store.settings import StoreSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_FORBIDDEN = 403


@dataclass(frozen=True)
class _Made:
    """What a process makes once."""

    owner: int
    """The process's id."""
    client: S3Client
    """boto3's client."""
    readers: ThreadPoolExecutor
    """Threads for parallel reads."""
    credentials: object
    """The credentials that the client began with; None where there are none."""


class S3Connection:
    """The client and reader threads of this process; made when first used, never carried to another."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._here: _Made | None = None
        self._budget = RetryBudget(settings.s3_retry_budget)

    def __getstate__(self) -> StoreSettings:
        return self._settings

    def __setstate__(self, settings: StoreSettings) -> None:
        self.__init__(settings)  # type: ignore[misc] # what is left out of the state is made anew

    @property
    def client(self) -> S3Client:
        """This process's boto3 client.

        :raises StoreError: the settings make no client.
        """
        return self._made().client

    @property
    def signs_payloads(self) -> bool:
        """Whether what is sent is guarded by the SHA-256 in its signature, which every server verifies."""
        return _signs_payloads(self.client, self._settings)

    @property
    def readers(self) -> ThreadPoolExecutor:
        """This process's threads for parallel reads."""
        return self._made().readers

    def _made(self) -> _Made:
        with self._lock:
            if self._here is None or self._here.owner != os.getpid():
                try:
                    session = _session(self._settings)
                    client = _make_client(session, self._settings)
                    credentials = _frozen(session)
                except (BotoCoreError, ValueError) as error:
                    raise translated(error, "connect to", self._settings.s3_endpoint_url or "S3") from error
                readers = ThreadPoolExecutor(self._settings.s3_read_threads, "s3-read")
                self._here = _Made(os.getpid(), client, readers, credentials)
            return self._here

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        with self._lock:
            here, self._here = self._here, None
        if here is not None and here.owner == os.getpid():
            here.readers.shutdown()
            here.client.close()

    def call(
        self,
        action: str,
        uri: str,
        request: Callable[[], Answer],
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> Answer:
        """Send ``request`` until it succeeds, fails for good, or was sent again as often as is allowed.

        ``on_failure`` sees every transient failure first and may raise in its place. When the credentials have run
        out it is sent once more, if there are others by now.

        :raises StoreError: what :func:`translated` makes of the failure.
        """
        tries, renewed = Tries(self._settings, self._budget), False
        used = self._made()

        def again(error: Exception) -> bool | float:
            nonlocal renewed
            if not renewed and is_expired(error):
                renewed = self._renew(used)
                return 0.0 if renewed else False
            if not is_transient(error):
                return False
            if on_failure is not None:
                on_failure(error)
            wait_s = tries.wait_s(cause_of(error), retry_after_s(error))
            return False if wait_s is None else wait_s

        try:
            for attempt in stamina.retry_context(on=again, attempts=None, timeout=None):
                with attempt:
                    answer = request()
        except (BotoCoreError, ClientError) as error:
            raise translated(error, action, uri, tries.told) from error
        self._budget.succeeded(retried=tries.sent > 1)
        return answer

    def _renew(self, used: _Made) -> bool:
        """Whether there is a client now with other credentials than ``used`` has."""
        with self._lock:
            if self._here is not used:
                return True  # another thread was first, or all was closed
            try:
                session = _session(self._settings)
                credentials = _frozen(session)
                if credentials is None or credentials == used.credentials:
                    return False
                client = _make_client(session, self._settings)
            except (BotoCoreError, ValueError) as error:
                log.warning("the credentials have run out, and with others there is no client: %s", error)
                return False
            self._here = _Made(used.owner, client, used.readers, credentials)
        RETRIES.add("credentials")
        log.warning("the credentials had run out; going on with those that there are now")
        used.client.close()  # what is under way ends; what is idle has no use any more
        return True

    def change(
        self,
        action: str,
        uri: str,
        request: Callable[[], Answer],
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> Answer:
        """As :meth:`call`, for what changes something: each attempt is fenced, see :mod:`workers.store.fence`."""

        def send() -> Answer:
            while True:
                until = fence.ask()
                if until is not None and time.time() >= until:
                    continue
                try:
                    with s3_expiry.expiring(until):
                        return request()
                except ClientError as error:
                    if until is None or status_of(error) != _FORBIDDEN or time.time() < until:
                        raise  # else it only took too long

        return self.call(action, uri, send, on_failure)


def _session(settings: StoreSettings) -> boto3.session.Session:
    secret, token = settings.s3_secret_access_key, settings.s3_session_token
    return boto3.session.Session(
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        aws_session_token=token.get_secret_value() if token else None,
        region_name=settings.s3_region,
    )


def _frozen(session: boto3.session.Session) -> object:
    """The session's credentials as they are now; None where there are none, or none are to be had now."""
    try:
        credentials: Any = session.get_credentials()
        return None if credentials is None else credentials.get_frozen_credentials()
    except (BotoCoreError, ClientError) as error:
        log.warning("there are no credentials: %s", error)
        return None


def _make_client(session: boto3.session.Session, settings: StoreSettings) -> S3Client:
    region = session.region_name or ("us-east-1" if settings.s3_endpoint_url else None)
    config = Config(
        signature_version="s3v4",
        connect_timeout=settings.s3_connect_timeout_s,
        read_timeout=settings.s3_read_timeout_s,
        max_pool_connections=settings.s3_max_connections,
        retries={
            "total_max_attempts": 1
        },  # ours are the only ones: counted, and of one budget with broken bodies
        tcp_keepalive=True,
        s3={"addressing_style": settings.s3_addressing_style},
        # We send checksums ourselves, as headers: boto3's own come as trailers, which older servers refuse.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra="mergemill",
    )
    where: dict[str, Any] = {"region_name": region, "endpoint_url": settings.s3_endpoint_url}
    client = session.client("s3", **where, config=config)
    if not _signs_payloads(client, settings):
        client.close()  # only now the endpoint is known, wherever it is configured
        unsigned: Any = {"addressing_style": settings.s3_addressing_style, "payload_signing_enabled": False}
        client = session.client("s3", **where, config=config.merge(Config(s3=unsigned)))
    s3_expiry.Expiry(client)
    return client


def _signs_payloads(client: S3Client, settings: StoreSettings) -> bool:
    """One hash is enough: where there is no TLS S3 wants it to be signed, elsewhere a CRC32 costs less."""
    return settings.s3_checksums == "when_required" or not client.meta.endpoint_url.startswith("https:")
