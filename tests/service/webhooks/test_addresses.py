"""Where webhooks may go: public addresses only, however an address is written."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.webhooks.addresses import Destinations, is_public

pytestmark = pytest.mark.fast

quick = settings(max_examples=50, deadline=None)

PRIVATE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "100::1", "5f00::1", "3fff::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not is_public(ip_address(address))
    assert Destinations().refusal("https", "example.com", address) is not None


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_is_reached_by_https_alone(address: str) -> None:
    assert Destinations().refusal("https", "example.com", address) is None
    assert Destinations().refusal("http", "example.com", address) is not None


def test_a_scoped_address_is_never_public() -> None:
    assert Destinations().refusal("https", "x", "2606:4700:4700::1111%eth0") is not None


@quick
@given(st.ip_addresses(v=4))
def test_an_ipv4_address_in_an_ipv6_one_is_judged_as_itself(address: IPv4Address) -> None:
    number = int(address)
    for form in (0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80):
        assert is_public(IPv6Address(form)) is is_public(address)
    assert not is_public(IPv6Address(number))


@quick
@given(st.ip_addresses())
def test_what_the_interpreter_calls_private_is_never_public(address: IPv4Address | IPv6Address) -> None:
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast:
        assert not is_public(address) or getattr(address, "ipv4_mapped", None) is not None


class TestAllowed:
    def test_a_network_also_by_http(self) -> None:
        allowed = Destinations.parse(["10.0.0.0/8", "::1", "127.0.0.1"])
        for address in ("10.1.2.3", "127.0.0.1", "::1", "::ffff:10.1.2.3"):
            assert allowed.refusal("http", "x", address) is None
        for address in ("127.0.0.2", "11.0.0.1", "169.254.169.254", "fe80::1%eth0"):
            assert allowed.refusal("http", "x", address) is not None

    def test_a_host_wherever_it_is(self) -> None:
        allowed = Destinations.parse(["Hooks.Internal."])
        assert allowed.refusal("http", "hooks.internal", "10.0.0.1") is None
        assert allowed.refusal("http", "HOOKS.internal.", "10.0.0.1") is None
        assert allowed.refusal("https", "evil.hooks.internal", "10.0.0.1") is not None

    @pytest.mark.parametrize(
        "entry", ["", "10.0.0.1/8", "10.0.0.0/33", "a b", "http://x", "*", "1.2.3", "300.1.1.1"]
    )
    def test_what_is_no_place(self, entry: str) -> None:
        with pytest.raises(ValueError, match="no address"):
            Destinations.parse([entry])


def test_odd_ways_to_write_loopback_are_seen_through_by_the_resolver() -> None:
    for host in ("127.1", "2130706433", "0x7f.0.0.1", "017700000001", "localhost"):
        for *_, address in socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM):
            assert Destinations().refusal("https", host, str(address[0])) is not None
