"""No secret is logged: what is called one, or looks like one, is left out of whatever people read."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

HIDDEN: Final = "***"
"""What stands in the place of a secret."""

_SECRET_KEY = re.compile(
    r"(?i)password|passwd|secret|token$|authorization|credential|access_key|api_key|cookie|signature"
)
_SECRETS = (
    # user:password@ of a URL, also without a user (Redis)
    r"(?P<before>\w://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)",
    # what makes a presigned URL work, and the same words in an AWS Authorization header
    r"(?i)(?P<before>\b(?:X-Amz-)?(?:Signature|Credential|Security-Token|AWSAccessKeyId)=)[^&\s'\",]+",
    r"(?i)(?P<before>\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer |basic )?)[^\s'\",]+",
    r"(?i)(?P<before>\bbearer\s)[\w.~+/=-]{8,}",
    # AWS credentials as files, environments and answers of its services spell them
    r"(?i)(?P<before>(?:secret_?access_?key|(?:session|security)_?token)['\"]?\s?[:=]\s?['\"]?)[^\s'\",&}]+",
    r"(?P<before>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    # API keys of ours, whose id is none, and the secrets that webhooks are signed with
    r"(?P<before>\bmm_[0-9a-zA-Z]{1,32}_)[0-9a-zA-Z]{8,}",
    r"(?P<before>\bwhsec_)[\w+/=-]+",
)
_SECRET_TEXT = tuple((re.compile(pattern), rf"\g<before>{HIDDEN}") for pattern in _SECRETS)


def hidden_text(text: str) -> str:
    """``text`` without passwords in URLs, signatures, credentials, tokens and keys."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: whatever is called a secret, or looks like one, becomes :data:`HIDDEN`."""
    return {key: _hide(key, value) for key, value in event.items()}


def _hide(key: object, value: Any) -> Any:
    if isinstance(key, str) and _SECRET_KEY.search(key) and not isinstance(value, bool | int | float | None):
        return HIDDEN
    if isinstance(value, str):
        return hidden_text(value)
    if isinstance(value, Mapping):
        return {name: _hide(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(None, item) for item in value]
    if isinstance(value, BaseException):
        return hidden_text(f"{type(value).__name__}: {value}")
    return value
