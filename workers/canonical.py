"""What has to be the same everywhere for the bytes to be the same: the fixed grids, the dtypes, and the one JSON
text of a value.

Takes the standard library alone, so that who only computes needs no more than torch and numpy.
"""

from __future__ import annotations

import json
from typing import Any

BLOCK_BYTES = 1 << 20
"""Digest blocks, in bytes of output; big tensors are only ever split on a multiple of it."""

PAGE_BYTES = 4096
"""A page, of memory and of files."""

SURVEY_ELEMENTS = 1 << 18
"""Survey blocks, in elements: the fixed grid of every statistic."""

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element of each safetensors dtype that Mergemill can carry."""

MERGEABLE_DTYPES = ("F32", "F16", "BF16")
"""The dtypes that arithmetic is done on (in float32)."""

JSONValue = Any
"""A value that :mod:`json` reads and writes."""

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: JSONValue) -> str:
    """The one JSON text of a value: sorted keys, no spaces, shortest floats that round-trip, no NaN."""
    return _CANONICAL.encode(value)
