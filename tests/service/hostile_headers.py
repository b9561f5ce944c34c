"""Headers of 100 MB, and what reading each takes: a program, so that its memory is its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workers.errors import HeaderError
from workers.safetensors_format import MAX_HEADER_BYTES, MAX_TENSORS, parse

_EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def _list_of(unit: bytes) -> bytes:
    return b'{"a":[' + b",".join([unit] * (MAX_HEADER_BYTES // (len(unit) + 1) - 10)) + b"]}"


def _tensors(count: int) -> bytes:
    text = b"{" + b",".join(b'"%x":%s' % (number, _EMPTY) for number in range(count)) + b"}"
    return text + b" " * (MAX_HEADER_BYTES - len(text))


HEADERS = {
    "lists": lambda: _list_of(b"[]"),
    "metadata": lambda: b'{"__metadata__":{' + _list_of(b'"k":"v"')[6:-2] + b"}}",
    "too many tensors": lambda: _tensors(2 * MAX_TENSORS),
    "tensors": lambda: _tensors(MAX_TENSORS),
    "a name": lambda: b'{"' + b"x" * (MAX_HEADER_BYTES - 100) + b'":' + _EMPTY + b"}",
}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Print, by kind, how many KiB more than its text a header took, and what was said of it."""
    found = {}
    for kind, make in HEADERS.items():
        text = make()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        try:
            said = f"{len(parse(text, 8 + len(text)).entries)} tensors"
        except HeaderError as error:
            said = str(error)
        found[kind] = (_status("VmHWM") - before, said)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
