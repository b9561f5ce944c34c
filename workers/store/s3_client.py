"""Requests to S3: one client a process, bounded retries, and errors that say what to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import stamina
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's name for it
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
)

from workers.errors import (
    AccessDeniedError,
    InvalidPartError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.redaction import hidden_text
from workers.store import fence, s3_expiry
from workers.store.settings import StoreSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Answer = TypeVar("Answer")

_CONNECTION_ERRORS = (ConnectionError, HTTPClientError, IncompleteReadError)
_TRANSIENT_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "BadDigest",
    "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
_NOT_IMPLEMENTED = 501
_FORBIDDEN = 403


class S3Connection:
    """The client and reader threads of this process; made when first used, never carried to another."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._owner = 0
        self._client: S3Client | None = None
        self._readers: ThreadPoolExecutor | None = None

    def __getstate__(self) -> StoreSettings:
        return self._settings

    def __setstate__(self, settings: StoreSettings) -> None:
        self.__init__(settings)  # type: ignore[misc] # what is left out of the state is made anew

    @property
    def client(self) -> S3Client:
        """This process's boto3 client.

        :raises StoreError: the settings make no client.
        """
        return self._made()[0]

    @property
    def signs_payloads(self) -> bool:
        """Whether what is sent is guarded by the SHA-256 in its signature, which every server verifies."""
        return _signs_payloads(self.client, self._settings)

    @property
    def readers(self) -> ThreadPoolExecutor:
        """This process's threads for parallel reads."""
        return self._made()[1]

    def _made(self) -> tuple[S3Client, ThreadPoolExecutor]:
        with self._lock:
            if self._client is None or self._readers is None or self._owner != os.getpid():
                try:
                    self._client = _make_client(self._settings)
                except (BotoCoreError, ValueError) as error:
                    raise translated(error, "connect to", self._settings.s3_endpoint_url or "S3") from error
                self._readers = ThreadPoolExecutor(self._settings.s3_read_threads, "s3-read")
                self._owner = os.getpid()
            return self._client, self._readers

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        with self._lock:
            client, readers, owner = self._client, self._readers, self._owner
            self._client = self._readers = None
        if owner == os.getpid() and client is not None and readers is not None:
            readers.shutdown()
            client.close()

    def call(
        self,
        action: str,
        uri: str,
        request: Callable[[], Answer],
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> Answer:
        """Send ``request`` until it succeeds, fails for good, or has failed transiently often enough.

        ``on_failure`` sees every transient failure first and may raise in its place.

        :raises StoreError: what :func:`translated` makes of the failure.
        """

        def is_transient(error: Exception) -> bool:
            if not _is_transient(error):
                return False
            if on_failure is not None:
                on_failure(error)
            return True

        settings = self._settings
        try:
            for attempt in stamina.retry_context(
                on=is_transient,
                attempts=settings.s3_max_attempts,
                timeout=None,
                wait_initial=settings.s3_retry_wait_s,
                wait_max=settings.s3_retry_wait_max_s,
                wait_jitter=settings.s3_retry_wait_s,
            ):
                with attempt:
                    return request()
        except (BotoCoreError, ClientError) as error:
            raise translated(error, action, uri) from error
        raise AssertionError("stamina either returns or raises")

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


def code_of(error: BaseException) -> str:
    """The S3 error code, or ``""``."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: BaseException) -> int:
    """The HTTP status, or 0 where there was no answer."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def translated(error: Exception, action: str, uri: str) -> StoreError:
    """The store error that a failed request stands for."""
    if isinstance(error, ClientError):
        return _translated_answer(error, f"cannot {action} {uri}")
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return AccessDeniedError(
            f"cannot {action} {uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "MERGEMILL_STORE__S3_ACCESS_KEY_ID and MERGEMILL_STORE__S3_SECRET_ACCESS_KEY, where the service runs, "
            "or give its machine a role"
        )
    if isinstance(error, NoRegionError):
        return StoreError(
            f"cannot {action} {uri}: no region is set; set MERGEMILL_STORE__S3_REGION or AWS_DEFAULT_REGION"
        )
    told = hidden_text(str(error))  # an address may hold a signature
    if isinstance(error, IncompleteReadError):
        return TruncatedReadError(f"cannot {action} {uri}: the connection kept breaking off early: {told}")
    if isinstance(error, _CONNECTION_ERRORS):
        return StoreUnavailableError(
            f"cannot {action} {uri}: {told}; is the endpoint (MERGEMILL_STORE__S3_ENDPOINT_URL) right and up?"
        )
    return StoreError(f"cannot {action} {uri}: {told}")


def _translated_answer(error: ClientError, what: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    message = error.response.get("Error", {}).get("Message") or ""
    reason = f"{what}: the store answered {status} {code} {message}".rstrip()
    found: StoreError
    if code == "NoSuchUpload":
        found = UploadNotFoundError(f"{what}: the upload was completed or aborted, or never opened")
    elif code in ("InvalidPart", "InvalidPartOrder"):
        found = InvalidPartError(reason)
    elif _is_transient(error):
        found = StoreUnavailableError(f"{reason}, again and again")
    elif status == _FORBIDDEN or code in _DENIED_CODES:
        found = AccessDeniedError(f"{reason}; check the credentials, and that their policy allows this")
    elif code == "NoSuchBucket":
        found = ObjectNotFoundError(
            f"{what}: there is no such bucket; create it, or check MERGEMILL_STORE__S3_ENDPOINT_URL"
        )
    elif status == 404:
        found = ObjectNotFoundError(f"{what}: there is no such object")
    elif status == 301 or code == "AuthorizationHeaderMalformed":
        found = StoreError(f"{reason}; the bucket is in another region, set MERGEMILL_STORE__S3_REGION")
    else:
        found = StoreError(reason)
    return found


def _is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status = status_of(error)
        broken = status >= 500 and status != _NOT_IMPLEMENTED
        return broken or status == 429 or code_of(error) in _TRANSIENT_CODES
    return isinstance(error, _CONNECTION_ERRORS)


def _make_client(settings: StoreSettings) -> S3Client:
    secret, token = settings.s3_secret_access_key, settings.s3_session_token
    session = boto3.session.Session(
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        aws_session_token=token.get_secret_value() if token else None,
        region_name=settings.s3_region,
    )
    region = session.region_name or ("us-east-1" if settings.s3_endpoint_url else None)
    config = Config(
        signature_version="s3v4",
        connect_timeout=settings.s3_connect_timeout_s,
        read_timeout=settings.s3_read_timeout_s,
        max_pool_connections=settings.s3_max_connections,
        retries={"total_max_attempts": 1},  # ours are the only ones: counted, and with jitter
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
