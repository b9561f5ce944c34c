"""Models on disk whose rows tell where they are from: row r of model n's embedding is 1000 n + r, of its head + 0.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import Planned, plan_recipe
from service.recipe import parse_recipe
from tests.checkpoints import llama_config, llama_tensors, read_checkpoint, write_checkpoint
from tests.tokenizers import bpe, files
from tests.workers.execute import run
from workers.store.local import LocalStore

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPE: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2}
ONE = bpe(["a", "b", "c", "ab"], [("a", "b")], added=["<x>"])
TWO = bpe(["c", "b", "a", "d", "bc"], [("b", "c")], special=["<sys>"], added=["<y>"])
THREE = bpe(["a", "b", "d", "c", "e", "ab"], [("a", "b")], added=["<y>", "<z>"])


def write_model(
    place: Path,
    number: int,
    tokenizer: tokenizers.Tokenizer | None,
    *,
    rows: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    more: Mapping[str, str] | None = None,
) -> Path:
    """A small Llama with this tokenizer."""
    count = rows or (tokenizer.get_vocab_size(with_added_tokens=True) if tokenizer else 8)
    tensors = llama_tensors(number, vocab=count, tied=tied, dtype=dtype, **SHAPE)
    for name, half in ((EMBEDDING, 0.0), (HEAD, 0.5)):
        if name in tensors:
            tensors[name] = (1000 * number + torch.arange(count) + half).unsqueeze(1).repeat(1, 8).to(dtype)
    said = llama_config(vocab=count, tied=tied, dtype=dtype, **SHAPE) | dict(config or {})
    own = {} if tokenizer is None else files(tokenizer)
    return write_checkpoint(place, tensors, said, extra_files={**own, **(more or {})})


def planned(places: Sequence[Path | str], weights: list[float] | None = None, **more: Any) -> Planned:
    """A plan of their weighted mean."""
    given = weights or [1.0] * len(places)
    models = [
        {"model": str(place), "parameters": {"weight": weight}}
        for place, weight in zip(places, given, strict=True)
    ]
    value = {"merge_method": "linear", "models": models} | more
    return plan_recipe(parse_recipe(value), PlanOptions(worker_memory_bytes=1 << 40), LocalStore(), {})


def rows(found: Planned, output: Path, name: str = EMBEDDING) -> list[float]:
    """The first element of every row that the plan makes."""
    run(found, output)
    (output / "model.safetensors.index.json").write_text(found.plan.index)
    return [float(value) for value in read_checkpoint(output)[name][:, 0]]


def vocabulary(found: Planned) -> dict[str, int]:
    """The tokens of the tokenizer that goes to the output."""
    text = found.texts.get("tokenizer.json")
    if text is None:
        info = found.copied["tokenizer.json"]
        text = Path(info.uri.removeprefix("file://")).read_bytes()
    held: dict[str, int] = tokenizers.Tokenizer.from_str(text.decode()).get_vocab()
    return held
