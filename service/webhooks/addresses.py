"""Where webhooks may go: to public addresses, and where the deployment says so. Pure.

References: the IANA special-purpose address registries; RFC 6052 (NAT64), RFC 3056 (6to4), RFC 4291 (IPv4 in IPv6).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_NEVER: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
            "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16",
            "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
        ),
    )
)  # fmt: skip
"""What is not public, whatever the interpreter's :mod:`ipaddress` thinks: its tables differ between releases."""

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


def really(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for (mapped, 6to4, NAT64), or the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether an address is anybody's: not of this machine, its network, or its cloud's metadata."""
    found = really(address)
    return found.is_global and not found.is_multicast and not any(found in network for network in _NEVER)


@dataclass(frozen=True, slots=True)
class Destinations:
    """Where connections may go."""

    networks: tuple[Network, ...] = ()
    """Addresses that are allowed though they are not public, also by plain http."""
    hosts: frozenset[str] = frozenset()
    """Hosts that are allowed wherever they are, also by plain http; in lower case."""

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """Read addresses, networks (CIDR) and host names.

        :raises ValueError: an entry is none of these.
        """
        networks, hosts = [], set()
        for entry in entries:
            try:
                networks.append(ip_network(entry.strip("[]")))
            except ValueError:
                host = entry.lower().rstrip(".")
                if not _HOST.fullmatch(host) or host.replace(".", "").isdigit():
                    raise ValueError(f"{entry!r} is no address, network (CIDR) or host name") from None
                hosts.add(host)
        return cls(tuple(networks), frozenset(hosts))

    def allow_something(self) -> bool:
        """Whether any place is allowed that is not public."""
        return bool(self.networks or self.hosts)

    def refusal(self, scheme: str, host: str, address: str) -> str | None:
        """Why there may be no connection to this address of this host; it does not tell the address.

        :param address: what is to be connected to, as the resolver writes it.
        """
        found = ip_address(address.partition("%")[0])
        places = {found, really(found)}
        if host.lower().rstrip(".") in self.hosts or any(
            place in network for place in places for network in self.networks
        ):
            return None
        if "%" in address or not is_public(found):
            return "it is not at a public address, and this service is not told to allow that"
        if scheme != "https":
            return "only https is allowed there"
        return None
