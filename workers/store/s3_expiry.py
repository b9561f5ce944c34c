"""S3 requests that the server refuses once their time is over.

The signature of an ordinary request is good for a quarter of an hour. Signed in its URL, as presigned URLs are, a
request says itself how long it is good, and every server that knows Signature Version 4 keeps to that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

from botocore import UNSIGNED

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import ClientError
    from botocore.signers import RequestSigner
    from mypy_boto3_s3 import S3Client

OPERATIONS: Final = ("PutObject", "DeleteObject", "CreateMultipartUpload")
"""What can expire. Uploads that ended take no completion and no part, however late: these need not."""

MOST_SKEW_S: Final = 2.0
"""Difference between our clock and a server's that is worth telling about, in seconds."""

_UNTIL: ContextVar[float | None] = ContextVar("until", default=None)


@contextmanager
def expiring(until: float | None) -> Iterator[None]:
    """Sign what this thread sends within so that it expires at ``until`` (Unix seconds), or as ever for ``None``.

    Signatures know whole seconds, and one at least.
    """
    token = _UNTIL.set(until)
    try:
        yield
    finally:
        _UNTIL.reset(token)


def install(client: S3Client) -> None:
    """Make a client sign so."""
    for operation in OPERATIONS:
        client.meta.events.register_first(f"choose-signer.s3.{operation}", _choose)
        client.meta.events.register(f"before-sign.s3.{operation}", _sign)


def skew(error: ClientError) -> str:
    """A hint that clocks differ, when the answer says so; else nothing."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        ahead = parsedate_to_datetime(date).timestamp() - time.time() if date else 0.0
    except ValueError:
        return ""
    if abs(ahead) <= MOST_SKEW_S:
        return ""
    return f"; the store's clock is {ahead:+.0f} s from this machine's, which is more than requests may last"


def _choose(**_: Any) -> Any:
    """Leave the signing to :func:`_sign`, where it is to expire."""
    return None if _UNTIL.get() is None else UNSIGNED


def _sign(
    request: AWSRequest, signing_name: str, region_name: str, request_signer: RequestSigner, **_: Any
) -> None:
    until = _UNTIL.get()
    if until is None:
        return
    region = request.context.get("signing", {}).get("region") or region_name
    lasts = max(1, int(until) - int(time.time()))
    auth = request_signer.get_auth_instance(signing_name, region, "s3v4-query", expires=lasts)
    body, request.data = request.data, b""  # it takes what there is for parameters of a form
    auth.add_auth(request)
    request.data = body
