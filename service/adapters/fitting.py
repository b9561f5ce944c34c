"""A checkpoint with an adapter on top of it: the same tensors, some with changes that are computed as they are read.

Nothing is merged before: each changed tensor stays where it is, and every run of its elements that is read later is
read with the rows and columns of the factors that it takes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from service.adapters.reading import Adapter, Factors
from service.planning.checkpoint import TIED_NAMES, Checkpoint, Laid, StoredTensor
from service.planning.matching import EMBEDDING_NAMES
from service.recipe.language import MAX_RANK
from workers.errors import PlanError
from workers.sources import Change

_SHOWN = 8
_MOST_STRIPPED = 2
_MOST_PREFIXES = 16


def adapted(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter's changes.

    :raises PlanError: lists everything of the adapter that does not fit.
    """
    wanted = [f"{each.module}.weight" for each in adapter.factors]
    called = _called([*wanted, *adapter.replaced], checkpoint.tensors)
    tensors, problems = dict(checkpoint.tensors), _Problems()
    for name, tensor in adapter.replaced.items():
        own = called.get(name, name)
        if own in tensors and _is_tied(own, checkpoint):
            problems.add("holds an output head of its own, which the model ties to the embedding", own)
        else:
            _replace(tensors, own, tensor, adapter, problems)
    for factors, name in zip(adapter.factors, wanted, strict=True):
        own = called.get(name, name)
        if _is_tied(own, checkpoint):
            problems.add(
                "changes an output head that is tied to the embedding, which would change as well", name
            )
        elif own in tensors:
            _change(tensors, own, factors, adapter, problems)
        else:
            problems.add("changes modules that the model does not have", name)
    if problems.found:
        raise PlanError(*problems.sentences(f"{adapter.uri} on {checkpoint.uri}"))
    if checkpoint.is_tied:
        _retie(tensors, checkpoint)
    return replace(checkpoint, tensors=tensors, adapter=Laid(adapter.uri, adapter.pins))


class _Problems:
    """What is wrong, each thing with all the names that it is true of."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Note that something is wrong with a tensor."""
        self.found.setdefault(what, []).append(name)

    def sentences(self, whose: str) -> list[str]:
        """One for each thing."""
        return [
            f"{whose}: {what}: {', '.join(names[:_SHOWN])}"
            + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            for what, names in self.found.items()
        ]


def _called(wanted: Sequence[str], names: Mapping[str, StoredTensor]) -> dict[str, str]:
    """What the checkpoint calls the tensors that an adapter names.

    Both may have been saved with or without the head around the model: ``transformer.h.0...`` and ``h.0...``. So
    where not all names are there, they are looked for without what they begin with, or with more before, provided
    that all of them are found so, no two at the same place, and in one way.
    """
    if not wanted or all(name in names for name in wanted):
        return {}
    ways = []
    for count in range(1, _MOST_STRIPPED + 1):
        ways.append({name: name.split(".", count)[-1] for name in wanted})
    first = wanted[0]
    fuller = (known.removesuffix(first) for known in names if known.endswith(f".{first}"))
    ways += [{name: f"{prefix}{name}" for name in wanted} for prefix in islice(fuller, _MOST_PREFIXES)]
    fitting = [
        way
        for way in ways
        if all(own in names for own in way.values()) and len(set(way.values())) == len(way)
    ]
    return fitting[0] if len(fitting) == 1 else {}


def _replace(
    tensors: dict[str, StoredTensor], own: str, tensor: StoredTensor, adapter: Adapter, problems: _Problems
) -> None:
    """Put a tensor that the adapter holds whole in the place of the model's."""
    there = tensors.get(own)
    if there is None:
        problems.add("holds tensors that the model does not have", own)
    elif there.shape != tensor.shape:
        problems.add(
            "holds tensors of another shape than the model's",
            f"{own} {list(tensor.shape)}, not {list(there.shape)}",
        )
    elif not tensor.is_float or not there.is_float:
        problems.add("holds tensors of a dtype without arithmetic", f"{own} ({tensor.dtype})")
    elif own in (*EMBEDDING_NAMES, *TIED_NAMES) or adapter.config.is_saved_whole(own.rpartition(".")[0]):
        tensors[own] = replace(tensor, name=own)
    else:
        problems.add("holds tensors that are no factors and that `modules_to_save` does not name", own)


def _change(
    tensors: dict[str, StoredTensor], own: str, factors: Factors, adapter: Adapter, problems: _Problems
) -> None:
    """Add the product of two factors to a tensor."""
    tensor, config = tensors[own], adapter.config
    a, b, rank = factors.a, factors.b, factors.rank
    columns = a.numel // rank if rank else 0
    if not rank or b.numel != b.shape[0] * rank or not columns or not b.numel:
        problems.add("has factors that do not fit together", f"{own} (A {list(a.shape)}, B {list(b.shape)})")
        return
    if rank > MAX_RANK:
        problems.add(f"has factors of a higher rank than the {MAX_RANK} that are added", f"{own} ({rank})")
        return
    if rank != (said := config.rank_of(factors.module)):
        problems.add("has factors of another rank than its config says", f"{own} ({rank}, not {said})")
        return
    if wrong := [each for each in (tensor, a, b) if not each.is_float]:
        problems.add(
            "takes arithmetic on a dtype that has none (a quantised model?)", f"{own} ({wrong[0].dtype})"
        )
        return
    fits = tensor.shape == (b.shape[0], *a.shape[1:]) and not factors.is_embedding
    turned = tensor.shape == (columns, b.shape[0]) and len(a.shape) == 2
    if not fits and not turned:
        problems.add(
            "has factors that do not fit the model's tensors",
            f"{own} {list(tensor.shape)} (A {list(a.shape)}, B {list(b.shape)})",
        )
        return
    transposed = turned and (not fits or config.fan_in_fan_out)
    change = Change(a.ref, b.ref, config.scale_of(factors.module, rank), transposed)
    tensors[own] = replace(tensor, changes=(*tensor.changes, change))


def _is_tied(name: str, checkpoint: Checkpoint) -> bool:
    if name not in TIED_NAMES or name in EMBEDDING_NAMES:
        return False
    return checkpoint.is_tied or (name not in checkpoint.tensors and checkpoint.may_be_tied)


def _retie(tensors: dict[str, StoredTensor], before: Checkpoint) -> None:
    """Where a tied head is stored as well as an embedding that has changed, it is that embedding once more."""
    for embedding in [tensors[name] for name in EMBEDDING_NAMES if name in tensors]:
        for name in TIED_NAMES:
            if (
                embedding != before.tensors[embedding.name]
                and name in tensors
                and name not in EMBEDDING_NAMES
                and tensors[name].shape == embedding.shape
            ):
                tensors[name] = replace(embedding, name=name)
