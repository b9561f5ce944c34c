"""The embedded stack's own admin key: in memory, and in a file that only its user can read."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from service.keys import EVERYWHERE, Limits, Scope, is_secret_of, new_key, split_token
from service.keystore import KeyStore

KEY_FILE = "api-key"
"""Name of the file in the stack's state directory."""


def own_key(state_dir: Path, redis_url: str, namespace: str) -> str:
    """The token of the stack's key: that of the last time, if it is still good, or a new one's.

    :raises JobStoreUnavailableError: Redis cannot be reached.
    """
    path = state_dir / KEY_FILE
    with KeyStore(redis_url, namespace) as keys:
        token = _kept(path)
        if token is not None and _is_good(token, keys):
            return token
        key, token = new_key(
            "the embedded stack",
            [Scope.ADMIN],
            time.time(),
            inputs=[EVERYWHERE],
            outputs=[EVERYWHERE],
            limits=dict.fromkeys(Limits.model_fields, 0),
        )
        keys.create(key)
    _keep(path, token)
    return token


def revoke_own(token: str, redis_url: str, namespace: str) -> None:
    """End a key that nobody will ask for again.

    :raises JobStoreUnavailableError: Redis cannot be reached.
    """
    found = split_token(token)
    if found is not None:
        with KeyStore(redis_url, namespace) as keys:
            keys.revoke(found[0], time.time())


def _kept(path: Path) -> str | None:
    """What the file holds; nothing, when others could have read it."""
    try:
        status = path.lstat()
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            return None
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _keep(path: Path, token: str) -> None:
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(f"{token}\n")
    draft.replace(path)


def _is_good(token: str, keys: KeyStore) -> bool:
    found = split_token(token)
    if found is None:
        return False
    key = keys.get(found[0])
    return key is not None and is_secret_of(found[1], key) and key.is_admin and key.ended(time.time()) is None
