"""The merged result as an adapter over the base: which factors it has, and what its adapter_config.json says. Pure.

What is added to a weight is a sum over the models, so only methods that are one can be written so. Of models that are
adapters on the base themselves the factors are put together, and what they add is exact; of others, and to a lower
rank, it is the nearest product of that rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.adapters.reading import CONFIG, PREFIX, WEIGHTS
from service.planning.checkpoint import TIED_NAMES, Checkpoint, StoredTensor
from service.planning.matching import OutputTensor
from service.recipe import Recipe
from workers.binding import bind
from workers.factors import FactorsPiece
from workers.methods.common import ADDING_METHODS
from workers.safetensors_format import encode, layout
from workers.sources import Arithmetic, Change, LowRank, Source, TensorRef
from workers.task import HeaderPiece, Part, PartResult

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Types of models whose linear layers are stored as ``[in, out]``."""

_EMBEDDING = re.compile(r"(^|\.)([^.]*embed[^.]*|wte|wpe|shared)\.weight$")
_SHOWN = 8
_CLOSE = 1e-6

__all__ = ["CONFIG", "WEIGHTS", "Drafted", "adapter_config", "draft", "errors"]


@dataclass
class Drafted:
    """An adapter that is to be made."""

    pieces: list[FactorsPiece] = field(default_factory=list)
    """One for each weight that it changes, in the base's order."""
    problems: list[str] = field(default_factory=list)
    """What makes it impossible."""
    notices: list[str] = field(default_factory=list)
    """What the user should know."""

    @property
    def header(self) -> HeaderPiece:
        """The header of its file."""
        tensors = []
        for piece in self.pieces:
            out, into = piece.shape
            shapes = (piece.rank, into), (out, piece.rank)
            tensors += [(name, piece.dtype, shape) for name, shape in zip(piece.names, shapes, strict=True)]
        return HeaderPiece("header", encode(layout(tensors), {"format": "pt"}))


def draft(recipe: Recipe, base: Checkpoint, tensors: Iterable[OutputTensor]) -> Drafted:
    """Find the factors of everything that the models add to the base."""
    drafted, lost, unranked = Drafted(), [], []
    for tensor in tensors:
        stored = base.tensors[tensor.name]
        added = _added(tensor, stored, drafted.problems)
        if added is None:
            continue
        changes, models = added
        if not _has_factors(stored) or (models and _is_embedding(stored.name)):
            lost.append(tensor.name)
        elif models and recipe.rank is None:
            unranked.append(tensor.name)
        else:
            drafted.pieces.append(_piece(recipe, base, stored, changes, models))
    if unranked:
        drafted.problems.append(
            f"rank: is required where models are no adapters on the base model, as for {_listed(unranked)}"
        )
    if lost:
        drafted.notices.append(
            f"the adapter has no factors for {len(lost)} tensor(s), which stay as the base model's are: {_listed(lost)}"
        )
    if not drafted.pieces and not drafted.problems:
        drafted.problems.append("models: none adds anything to a weight of the base model")
    return drafted


def adapter_config(recipe: Recipe, base: Checkpoint, base_name: str, parts: Iterable[Part]) -> str:
    """adapter_config.json as PEFT reads it: each module's scale is 1.

    :param base_name: what to call the base model.
    """
    pieces = [piece for part in parts for piece in part.pieces if isinstance(piece, FactorsPiece)]
    ranks = {_module(piece): piece.rank for piece in pieces}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    architectures = (base.config or {}).get("architectures") or []
    is_causal = any(str(each).endswith("ForCausalLM") or "LMHead" in str(each) for each in architectures)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(
            piece.transposed for piece in pieces if not _is_embedding(f"{_module(piece)}.weight")
        ),
        "bias": "none",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def errors(results: Iterable[PartResult]) -> dict[str, Any]:
    """How far the adapter is from what the models add: relative errors in the Frobenius norm, in all and by module."""
    found = {name: pair for result in results for name, pair in result.left_out.items()}
    lost = math.fsum(left for left, _ in found.values())
    total = math.fsum(whole for _, whole in found.values())
    each = {_without_suffix(name): _relative(left, whole) for name, (left, whole) in sorted(found.items())}
    return {"relative_error": _relative(lost, total), "relative_errors": each}


def _added(
    tensor: OutputTensor, base: StoredTensor, problems: list[str]
) -> tuple[tuple[Change, ...], tuple[tuple[TensorRef, float], ...]] | None:
    """What the models add to a tensor: changes of adapters, and whole tensors with coefficients; None for nothing."""
    if not isinstance(tensor.source, Arithmetic) or tensor.source.method not in ADDING_METHODS:
        sources = (
            (tensor.source.source,) if isinstance(tensor.source, StoredTensor) else tensor.source.sources
        )
        if sources != (base.source,):
            problems.append(f"{tensor.name}: another model's values cannot be written as an adapter")
        return None
    if not base.source.is_plain:
        problems.append(_not_stored(tensor))
        return None
    changes: list[Change] = []
    models: list[tuple[TensorRef, float]] = []
    coefficients = _coefficients(tensor.source)
    if tensor.source.method == "linear" and abs(math.fsum(coefficients) - 1) > _CLOSE:
        problems.append(f"{tensor.name}: the weights do not add up to 1, so the base model's would be scaled")
    for model, coefficient in zip(tensor.source.models, coefficients, strict=True):
        if not _add(model.ref, coefficient, base, changes, models):
            problems.append(_not_stored(tensor))
    return (tuple(changes), tuple(models)) if changes or models else None


def _add(
    source: Source,
    coefficient: float,
    base: StoredTensor,
    changes: list[Change],
    models: list[tuple[TensorRef, float]],
) -> bool:
    """Note what a model adds; whether that can be told."""
    if source == base.ref or not coefficient:
        return True
    if isinstance(source, LowRank):
        changes += [replace(each, scale=coefficient * each.scale) for each in source.changes]
        source = source.source
    if not isinstance(source, TensorRef):
        return False
    if source != base.ref:
        models.append((source, coefficient))
    return True


def _not_stored(tensor: OutputTensor) -> str:
    return (
        f"{tensor.name}: is computed on the way, and an adapter is made of what is stored: merge to a model first, and "
        "make an adapter of that"
    )


def _coefficients(arithmetic: Arithmetic) -> list[float]:
    """What each model's difference to the base is multiplied by."""
    formula = bind(arithmetic).formula({})
    return [formula.lambda_ * term.weight / (formula.divide or 1.0) for term in formula.terms]


def _piece(
    recipe: Recipe,
    base: Checkpoint,
    stored: StoredTensor,
    changes: Sequence[Change],
    models: Sequence[tuple[TensorRef, float]],
) -> FactorsPiece:
    rows, columns = stored.shape
    if changes:
        transposed = changes[0].transposed
    else:
        model_type = (base.config or {}).get("model_type")
        transposed = model_type in CONV1D_MODELS and stored.name not in TIED_NAMES
    shape = (columns, rows) if transposed else (rows, columns)
    module = stored.name.removesuffix(".weight")
    names = (
        (f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B")
        if _is_embedding(stored.name)
        else (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")
    )
    piece = FactorsPiece(
        "factors",
        names,
        shape,
        1,
        recipe.out_dtype_name or "F32",
        tuple(changes),
        stored.ref if models else None,
        tuple(models),
        transposed,
    )
    most = min(rows, columns) if models else sum(map(piece.rank_of, changes))
    return replace(piece, rank=most if recipe.rank is None else min(recipe.rank, most))


def _has_factors(stored: StoredTensor) -> bool:
    return len(stored.shape) == 2 and stored.numel > 0 and stored.is_float and stored.name.endswith(".weight")


def _is_embedding(name: str) -> bool:
    return _EMBEDDING.search(name) is not None


def _module(piece: FactorsPiece) -> str:
    return _without_suffix(piece.name)


def _without_suffix(name: str) -> str:
    return re.sub(r"\.lora_(A\.weight|embedding_A)$", "", name.removeprefix(PREFIX))


def _relative(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
