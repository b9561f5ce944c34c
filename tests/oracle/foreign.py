"""The other tools' side. Runs in their environment, and imports nothing of ours.

``python foreign.py REQUEST REPLY`` reads ``{"merge": [{"recipe", "output", "seed"}], "load": [directory],
"encode": {directory: [text]}, "render": {directory: [conversation]}}`` and writes ``{"versions": {tool: version},
"loaded": {directory: {"problem", "dtype"}}, "encoded": {directory: {text: [number]}},
"rendered": {directory: [text]}}``. An error ends it.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts.multimerge import main as multimerge
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARD_BYTES = 100_000
"""As ours, so that there is an index to compare."""


def merge(recipe: dict | list, output: str, seed: int) -> None:
    """Have mergekit run a recipe; of several documents, mergekit-multi."""
    if isinstance(recipe, list):
        merge_documents(recipe, output)
        return
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed, out_shard_size=SHARD_BYTES
    )
    run_merge(MergeConfiguration.model_validate(recipe), output, options)


def merge_documents(documents: list, output: str) -> None:
    """Have mergekit-multi run a recipe of several documents, none of whose methods is random."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yml"
        config.write_text(yaml.safe_dump_all(documents))
        places = ["--out-path", output, "--intermediate-dir", f"{directory}/stages"]
        switches = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        multimerge(args=[str(config), *places, *switches], standalone_mode=False)


@torch.inference_mode()
def load(directory: str) -> dict:
    """Open a checkpoint with transformers and generate greedily; what is wrong with it, if anything."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    tokens = torch.arange(3, 11).unsqueeze(0)
    logits = model(tokens).logits
    longer = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=4)
    keys = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    problem = None
    if keys:
        problem = f"keys that do not fit: {keys}"
    elif not torch.isfinite(logits).all():
        problem = "logits that are not finite"
    elif longer.shape[1] <= tokens.shape[1]:
        problem = "nothing was generated"
    return {"problem": problem, "dtype": str(logits.dtype).removeprefix("torch.")}


def encode(directory: str, texts: list[str]) -> dict:
    """What a checkpoint's tokenizer makes of texts, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {text: tokenizer(text)["input_ids"] for text in texts}


def render(directory: str, talks: list) -> list:
    """What a checkpoint's chat template makes of conversations, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]


def main(request_path: str, reply_path: str) -> None:
    """Do all that is asked in one process: importing takes longer than merging."""
    transformers.logging.set_verbosity_error()
    request = json.loads(Path(request_path).read_text())
    for job in request["merge"]:
        merge(**job)
    tools = ("mergekit", "transformers", "torch", "safetensors")
    reply = {
        "versions": {tool: importlib.metadata.version(tool).split("+")[0] for tool in tools},
        "loaded": {directory: load(directory) for directory in request["load"]},
        "rendered": {directory: render(directory, talks) for directory, talks in request["render"].items()},
        "encoded": {directory: encode(directory, texts) for directory, texts in request["encode"].items()},
    }
    Path(reply_path).write_text(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])
