"""S3 requests that the server refuses once their time is over.

The signature of an ordinary request is good for a quarter of an hour. Signed in its URL, as presigned URLs are, a
request says itself how long it is good, and every server that knows Signature Version 4 keeps to that. It does so by
its own clock, which its answers tell, so clocks that differ do no harm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

from botocore import UNSIGNED
from botocore.auth import SIGV4_TIMESTAMP
from botocore.exceptions import NoCredentialsError

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.signers import RequestSigner
    from mypy_boto3_s3 import S3Client

OPERATIONS: Final = ("PutObject", "DeleteObject", "CreateMultipartUpload")
"""What can expire. Uploads that ended take no completion and no part, however late: these need not."""

SKEW_S: Final = 2.0
"""Smallest difference of clocks that counts, in seconds: answers tell whole ones, and are on their way for a while."""

LONGEST_S: Final = 7 * 24 * 3600
"""Longest time that a signature may be good, in seconds."""

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


class Expiry:
    """How one client signs what is to expire."""

    def __init__(self, client: S3Client) -> None:
        self._ahead = 0.0
        events = client.meta.events
        events.register("after-call.s3", self._learn)
        for operation in OPERATIONS:
            events.register_first(f"choose-signer.s3.{operation}", self._choose)
            events.register(f"before-sign.s3.{operation}", self._sign)

    def _learn(self, parsed: Any, **_: Any) -> None:
        """By how much the server's clock is ahead of ours, or by a little less: then requests expire early."""
        date = parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            ahead = parsedate_to_datetime(date).timestamp() - time.time() if date else 0.0
        except ValueError:
            return
        self._ahead = ahead if abs(ahead) > SKEW_S else 0.0

    @staticmethod
    def _choose(**_: Any) -> Any:
        """Leave the signing to :meth:`_sign`, where it is to expire."""
        return None if _UNTIL.get() is None else UNSIGNED

    def _sign(
        self,
        request: AWSRequest,
        signing_name: str,
        region_name: str,
        request_signer: RequestSigner,
        **_: Any,
    ) -> None:
        until = _UNTIL.get()
        if until is None:
            return
        region = request.context.get("signing", {}).get("region") or region_name
        now = int(time.time() + self._ahead)
        lasts = max(1, int(min(until + self._ahead, now + LONGEST_S)) - now)
        auth: Any = request_signer.get_auth_instance(signing_name, region, "s3v4-query", expires=lasts)
        _sign_at(auth, request, now)


def _sign_at(auth: Any, request: AWSRequest, now: int) -> None:
    """What ``auth.add_auth`` does, at another time than by our clock, and without taking the body for a form."""
    if auth.credentials is None:
        raise NoCredentialsError
    body, request.data = request.data, b""
    request.context["timestamp"] = datetime.fromtimestamp(now, UTC).strftime(SIGV4_TIMESTAMP)
    auth._modify_request_before_signing(request)
    to_sign = auth.string_to_sign(request, auth.canonical_request(request))
    auth._inject_signature_to_request(request, auth.signature(to_sign, request))
    request.data = body
