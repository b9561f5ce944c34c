"""config.json of a merged model. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from service.planning.depth import with_depths
from service.planning.pairing import Inputs, pair
from service.recipe import DTYPES, Recipe

_DTYPE_KEYS = {"torch_dtype", "dtype"}


def merged_config(recipe: Recipe, inputs: Inputs, dtypes: Container[str]) -> dict[str, Any] | None:
    """The reference's config with the layers and the dtype that are written; ``None`` when it has none.

    :param dtypes: safetensors dtypes of the merged tensors; of several floating-point ones none is named.
    """
    config, _ = with_depths(inputs.reference.config, pair(recipe, inputs).slicings)
    if config is None:
        return None
    corrected = {key: value for key, value in config.items() if key != "_name_or_path"}
    found = [name for name, dtype in DTYPES.items() if dtype in dtypes]
    if len(found) == 1:
        corrected = _with_dtype(corrected, found[0])
        if not _DTYPE_KEYS & corrected.keys():
            corrected["torch_dtype"] = found[0]
    return corrected


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype, and that of the models nested in it (``text_config``), is ``dtype``."""
    corrected: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            corrected[key] = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            corrected[key] = _with_dtype(value, dtype)
        else:
            corrected[key] = value
    return corrected
