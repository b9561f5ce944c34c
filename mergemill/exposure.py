"""Whether the API may listen where it is told to: beyond this machine it wants keys."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time

from service.keystore import KeyStore
from service.settings import Settings
from workers.errors import ExposedError, JobStoreUnavailableError

log = logging.getLogger(__name__)


def check_exposure(host: str, settings: Settings) -> None:
    """Refuse to listen at ``host`` for whoever can reach it.

    :raises ExposedError: others than this machine can, and requests need no key, or nobody has one.
    """
    if is_loopback(host):
        return
    if settings.auth == "off":
        raise ExposedError(
            f"MERGEMILL_AUTH=off lets whoever reaches {host or 'this machine'} read and write with the service's "
            "credentials: set MERGEMILL_HOST=127.0.0.1, or MERGEMILL_AUTH=keys and make a key (a proxy that checks "
            "its users itself can add one to their requests)"
        )
    try:
        with KeyStore(settings.redis_url, settings.namespace) as keys:
            has_key = keys.any_usable(time.time())
    except JobStoreUnavailableError as error:  # then nobody gets past the check of a key either
        log.warning("could not look whether there is an API key: %s", error)
        return
    if not has_key:
        raise ExposedError(
            f"listening at {host or 'every address'} needs an API key, and there is none yet: make the first one with "
            "`mergemill keys create admin --scope admin` (with this service's MERGEMILL_REDIS_URL and "
            "MERGEMILL_NAMESPACE), or set MERGEMILL_HOST=127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``, an address or a name."""
    if not host:
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
