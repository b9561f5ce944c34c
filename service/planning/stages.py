"""Earlier merges of a recipe of several documents, as later ones see them: checkpoints that nobody else does. Pure.

A tensor of an earlier merge is read in one of three ways. What is copied is read where it came from. What is merged
element by element, without a look at the whole tensor first, is computed again by whoever reads it, and lies nowhere.
All else is **staged**: written below the output, hidden, by parts like any others that are done before, and removed
when the job ends. Which bytes a staged file has is in its name, so that it needs no ETag to be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from service.planning.checkpoint import HIDDEN, Checkpoint, StoredTensor, tensors_of
from service.planning.config import merged_config
from service.planning.layout import arithmetic_json, shards_of
from service.planning.matching import OutputTensor, match
from service.planning.pairing import Inputs
from service.planning.plan import SEMANTICS_VERSION, Plan, PlanOptions, lay_out
from service.recipe import Recipe
from workers.binding import bind
from workers.safetensors_format import parse
from workers.sources import Derived
from workers.store.base import ObjectInfo
from workers.store.uris import join
from workers.task import STAGED, Arithmetic, TensorRef, digest

MAX_STREAMED = 16
"""Most ranges that are read to compute an earlier merge's tensor again: documents that each use the one before twice
read twice as many."""

NOWHERE = "file:///output"
"""The output of a plan that is made for none."""


@dataclass(frozen=True)
class Stage:
    """An earlier merge, planned."""

    name: str
    """What later documents call it."""
    plan: Plan | None
    """What makes the staged part of it; ``None`` when nothing of it is staged."""
    notices: tuple[str, ...]
    """What the user should know of it."""
    checkpoint: Checkpoint
    """What later documents read."""


def draft_stage(
    recipe: Recipe,
    inputs: Inputs,
    files: Mapping[str, ObjectInfo],
    options: PlanOptions,
    baseline_bytes: int,
    output: str | None,
    *,
    whole: bool = False,
) -> tuple[Stage | None, list[str]]:
    """An earlier merge, when it can be made, and all that keeps it from being made.

    :param files: what a later merge that takes its config, or its tokenizer, takes besides.
    :param whole: whether everything that is merged has to be stored, as for an adapter that is made of it.
    """
    matched = match(recipe, inputs)
    problems = list(matched.problems)
    if not inputs.reference.tensors:
        problems.append(f"{inputs.reference.uri} holds no tensors")
    staged = tuple(tensor for tensor in matched.tensors if _is_staged(tensor, whole))
    plan = None
    notices = matched.notices
    if staged and not problems:
        prefix = f"{STAGED}{_identity(staged, options)}-"
        plan, excesses = lay_out(recipe, replace(matched, tensors=staged), options, baseline_bytes, prefix)
        problems += excesses
        notices = matched.notices if plan is None else plan.notices
    if problems or not matched.tensors:
        return None, problems
    # As in the files that it would have been written to.
    ordered = [tensor for shard in shards_of(matched.tensors, options.shard_bytes) for tensor in shard]
    name = recipe.name or ""
    place = output or NOWHERE
    uri = join(place, f"{HIDDEN}/merge-{digest(name)[:32]}")  # nothing is there
    tensors = _stored(uri, ordered, {} if plan is None else _refs(plan, place))
    config = merged_config(recipe, inputs, {tensor.dtype for tensor in ordered})
    seen = Checkpoint(uri, tensors, config, files, {})
    return Stage(name, plan, tuple(f"{name}: {notice}" for notice in notices), seen), problems


def _is_staged(tensor: OutputTensor, whole: bool) -> bool:
    """Whether a tensor can be read in no other way, in none that is worth it, or is wanted so."""
    source = tensor.source
    if not isinstance(source, Arithmetic) or not tensor.numel:
        return False
    if whole:
        return True
    bound = bind(source)
    return bound.whole is not None or bool(bound.passes) or len(source.refs) > MAX_STREAMED


def _stored(
    uri: str, tensors: Sequence[OutputTensor], staged: Mapping[str, TensorRef]
) -> dict[str, StoredTensor]:
    """The tensors of an earlier merge as later ones read them, in order."""
    found, start = {}, 0
    for name, shape, tensor in ((each.name, each.shape, each) for each in tensors):
        end = start + tensor.nbytes
        nowhere = TensorRef(uri, "", start, end, tensor.dtype)
        start = end
        if name in staged:
            found[name] = StoredTensor(name, shape, staged[name])
        elif isinstance(tensor.source, StoredTensor):
            found[name] = replace(tensor.source, name=name)
        elif tensor.numel:
            found[name] = StoredTensor(name, shape, nowhere, Derived("derived", tensor.source, tensor.dtype))
        else:
            found[name] = StoredTensor(name, shape, nowhere)
    return found


def _identity(staged: Iterable[OutputTensor], options: PlanOptions) -> str:
    """What tells files of other bytes apart."""
    of = [
        [tensor.name, tensor.dtype, tensor.shape, arithmetic_json(tensor.source)]
        for tensor in staged
        if isinstance(tensor.source, Arithmetic)
    ]
    return digest([SEMANTICS_VERSION, options.shard_bytes, options.allow_nonfinite, of])[:32]


def _refs(plan: Plan, output: str) -> dict[str, TensorRef]:
    """Where a staged merge's tensors will be."""
    found: dict[str, TensorRef] = {}
    for shard in plan.shards:
        header = parse(shard.header.encode(), shard.size)
        found |= {name: each.ref for name, each in tensors_of(join(output, shard.name), "", header).items()}
    return found
