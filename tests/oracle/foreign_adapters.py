"""PEFT's and mergekit's side of adapters. Runs in their environment, and imports nothing of ours.

``python foreign_adapters.py REQUEST`` writes, for each case and dtype, ``base``, ``adapter`` and ``merged`` below
``root/<dtype>/<case>``, what mergekit makes of each recipe to ``root/theirs/<recipe>``, and what PEFT makes of each
base and adapter in ``loads`` to the place beside them. An error ends it.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def model(kind: str) -> torch.nn.Module:
    """A small model of random weights, the same each time."""
    torch.manual_seed(1)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        )
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": kind == "tied"}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads))


def make(directory: Path, kind: str, config: dict, dtype: str) -> None:
    """A base, a random adapter on it as PEFT saves it, and what PEFT merges of what it then reads."""
    base = model(kind).to(getattr(torch, dtype))
    base.save_pretrained(directory / "base")
    torch.manual_seed(sum(map(ord, directory.name)))
    tuned = get_peft_model(base, LoraConfig(**config))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(directory / "adapter")
    fresh = type(base).from_pretrained(directory / "base", dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(fresh, directory / "adapter").merge_and_unload().save_pretrained(
        directory / "merged"
    )


def main(request_path: str) -> None:
    """Do all that is asked in one process."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    request = json.loads(Path(request_path).read_text())
    root = Path(request["root"])
    for dtype in request["dtypes"]:
        for name, (kind, config) in request["cases"].items():
            make(root / dtype / name, kind, request["lora"] | config, dtype)
    for base, adapter, output in request["loads"]:
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(fresh, adapter).merge_and_unload().save_pretrained(output)
    for name, recipe in request["recipes"].items():
        options = MergeOptions(
            copy_tokenizer=False,
            write_model_card=False,
            quiet=True,
            lora_merge_cache=str(root / "merged-by-mergekit"),
        )
        run_merge(MergeConfiguration.model_validate(recipe), str(root / "theirs" / name), options)


if __name__ == "__main__":
    main(*sys.argv[1:])
