"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "": 1, "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``64MiB``, ``1.5 GiB`` or ``1000``: decimal and binary units are told apart.

    >>> parse_size("5GB"), parse_size("64MiB")
    (5000000000, 67108864)

    :raises ValueError: it is nothing of the kind, or no whole, positive number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 5GB, 64MiB or 1000000")
    size = Fraction(match[1]) * _UNITS[match[2]]
    if size.denominator != 1 or size < 1:
        raise ValueError(f"{text!r} is not a whole, positive number of bytes")
    return int(size)


def binary_text(count: int) -> str:
    """A bound for people, in the largest binary unit that divides it.

    >>> binary_text(5 << 20), binary_text(1000)
    ('5MiB', '1000')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return str(count)


def size_text(count: float) -> str:
    """Bytes for people: three digits and a decimal unit.

    >>> size_text(999), size_text(5_000_000_000)
    ('999 B', '5.00 GB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:  # what would be shown as 1000
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
