"""Small LoRA adapters in PEFT's format for tests, written by the safetensors library; all are functions of a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import Tensors

PREFIX = "base_model.model."

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "peft_version": "0.21.2",
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
}
"""What PEFT writes, as far as it matters here."""


def factors(
    seed: int,
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, int],
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Random A and B for modules of a checkpoint, by the ranks in ``names``, under the keys that PEFT gives them."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for module, rank in names.items():
        out, into = tensors[f"{module}.weight"].shape
        out, into = (into, out) if transposed else (out, into)
        made[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator).to(dtype) * 0.1
        made[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype) * 0.1
    return made


def write_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter of these tensors, with :data:`CONFIG` but for ``config``, and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return directory
