"""What S3 and boto3 say when something fails: whether to ask again, and the store error that it stands for."""

from __future__ import annotations

from typing import Final

from botocore.exceptions import (
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's name for it
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ReadTimeoutError,
    SSLError,
)

from workers.errors import (
    AccessDeniedError,
    InvalidPartError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    UploadNotFoundError,
)
from workers.redaction import hidden_text

_CONNECTION_ERRORS = (ConnectionError, HTTPClientError, IncompleteReadError)
_TIMEOUTS = (ReadTimeoutError, ConnectTimeoutError)
_THROTTLING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_CHECKSUM_CODES = {"BadDigest", "XAmzContentSHA256Mismatch"}
_CONFLICT_CODES = {"OperationAborted", "ConditionalRequestConflict"}
_TRANSIENT_CODES = _THROTTLING_CODES | _CHECKSUM_CODES | _CONFLICT_CODES | {"RequestTimeout"}
_EXPIRED_CODES = {
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId",
}  # fmt: skip
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
_BAD_REQUEST, _FORBIDDEN, _TOO_MANY_REQUESTS, _NOT_IMPLEMENTED, _UNAVAILABLE, _FULL = (
    400,
    403,
    429,
    501,
    503,
    507,
)

WHERE_CREDENTIALS_ARE: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MERGEMILL_STORE__S3_ACCESS_KEY_ID and "
    "MERGEMILL_STORE__S3_SECRET_ACCESS_KEY, where the service runs, or give its machine a role"
)
"""What to do without credentials."""


def code_of(error: BaseException) -> str:
    """The S3 error code, or ``""``."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: BaseException) -> int:
    """The HTTP status, or 0 where there was no answer."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def retry_after_s(error: BaseException) -> float:
    """The seconds that a ``Retry-After`` header asks for; 0 for none, and for a date."""
    if not isinstance(error, ClientError):
        return 0.0
    text = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def is_expired(error: BaseException) -> bool:
    """Whether other credentials may help: these have run out, or are not known (any more).

    Where an answer has no body, S3 says no more than that the request was bad (they have run out), or forbidden (they
    were withdrawn, or may not).
    """
    bodiless = status_of(error) in {_BAD_REQUEST, _FORBIDDEN} and code_of(error) == str(status_of(error))
    return code_of(error) in _EXPIRED_CODES or bodiless


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(error, ClientError):
        status = status_of(error)
        broken = status >= 500 and status not in {_NOT_IMPLEMENTED, _FULL}
        return broken or status == _TOO_MANY_REQUESTS or code_of(error) in _TRANSIENT_CODES
    return isinstance(error, _CONNECTION_ERRORS) and not _is_distrust(error)


def cause_of(error: BaseException) -> str:
    """Why a transient failure happened, as one of :data:`workers.store.retries.CAUSES`."""
    if isinstance(error, _TIMEOUTS) or code_of(error) == "RequestTimeout":
        return "timeout"
    if code_of(error) in _CHECKSUM_CODES:
        return "checksum"
    if code_of(error) in _THROTTLING_CODES or status_of(error) in {_UNAVAILABLE, _TOO_MANY_REQUESTS}:
        return "throttled"
    return "server_error" if isinstance(error, ClientError) else "connection"


def translated(error: Exception, action: str, uri: str, told: str = "") -> StoreError:
    """The store error that a failed request stands for.

    :param told: how often it was sent, for a failure that another try might have mended.
    """
    what, again = f"cannot {action} {uri}", f" ({told})" if told else ""
    said = hidden_text(str(error))  # an address may hold a signature
    if isinstance(error, ClientError):
        return _translated_answer(error, what, again)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return AccessDeniedError(f"{what}: {said}; {WHERE_CREDENTIALS_ARE}")
    if isinstance(error, NoRegionError):
        return StoreError(f"{what}: no region is set; set MERGEMILL_STORE__S3_REGION or AWS_DEFAULT_REGION")
    if _is_distrust(error):
        return StoreError(
            f"{what}: {said}; the store's certificate is not trusted here, name its authority's in AWS_CA_BUNDLE"
        )
    if isinstance(error, _CONNECTION_ERRORS):
        why = "the connection kept breaking off early: " if isinstance(error, IncompleteReadError) else ""
        advice = "is the endpoint (MERGEMILL_STORE__S3_ENDPOINT_URL) right and up?"
        return StoreUnavailableError(f"{what}: {why}{said}; {advice}{again}")
    return StoreError(f"{what}: {said}")


def _translated_answer(error: ClientError, what: str, again: str) -> StoreError:
    code, status = code_of(error), status_of(error)
    message = error.response.get("Error", {}).get("Message") or ""
    reason = f"{what}: the store answered {status} {code} {message}".rstrip()
    found: StoreError
    if code == "NoSuchUpload":
        found = UploadNotFoundError(f"{what}: the upload was completed or aborted, or never opened")
    elif code in ("InvalidPart", "InvalidPartOrder"):
        found = InvalidPartError(reason)
    elif is_transient(error):
        found = StoreUnavailableError(f"{reason}{again}")
    elif code in _FULL_CODES or status == _FULL:
        found = StoreError(
            f"{reason}; there is no room left: free some, raise the quota or choose another output"
        )
    elif code in _EXPIRED_CODES:
        found = AccessDeniedError(
            f"{reason}; the credentials have run out or were withdrawn: renew them where the service runs. Those of a "
            "role or a shared file are read again by themselves, those in its settings or environment are not"
        )
    elif code == "RequestTimeTooSkewed":
        found = AccessDeniedError(f"{reason}; set this machine's clock")
    elif status == _FORBIDDEN:
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


def _is_distrust(error: BaseException) -> bool:
    return isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
