"""The plan: every byte of the output, and the parts and surveys that make it. Pure.

``make_plan`` is a function of the recipe, the inputs' headers and the options; the same of all three give
byte-identical JSON, wherever and whenever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from service.adapters.output import WEIGHTS, Drafted, draft
from service.planning.layout import (
    PART_REFS,
    Limits,
    held_by,
    model_survey,
    pack,
    pieces_of,
    shard_name,
    shards_of,
    survey_problem,
    survey_together,
)
from service.planning.matching import Match, match
from service.planning.pairing import Inputs
from service.planning.price import (
    BASELINE_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    Price,
    combined,
    price,
    workspace_bytes,
)
from service.recipe import Recipe
from workers.errors import PlanError
from workers.methods import get_method
from workers.methods.differences import differences
from workers.safetensors_format import encode, layout
from workers.task import Arithmetic, HeaderPiece, MergePiece, Part, Piece, Survey, digest, part_id

SEMANTICS_VERSION = 1
"""Version of the mathematics and of the layout: changes whenever the same plan could give other bytes."""

MIB = 1 << 20


class PlanOptions(BaseModel):
    """How to run a merge; nothing here changes a merged value, only ``shard_bytes`` changes the files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard_bytes: int = Field(default=5_000_000_000, ge=1, le=5 << 40)
    """Most tensor bytes of one output file."""
    part_bytes: int = Field(default=64 * MIB, ge=MIN_PART_BYTES, le=4 << 30)
    """Output bytes of one unit of work."""
    whole_tensor_bytes: int = Field(default=256 * MIB, ge=MIN_PART_BYTES, le=4 << 30)
    """Output bytes up to which a tensor is surveyed and merged in one read."""
    worker_memory_bytes: int = Field(default=2048 * MIB, ge=1)
    """Most memory of one worker process, everything included."""
    overwrite: bool = False
    """Replace a checkpoint that is already at the output."""
    allow_nonfinite: bool = False
    """Let NaN and Inf in the inputs through."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file, laid out to the byte."""

    name: str
    """File name."""
    size: int
    """Length in bytes."""
    header: str
    """Its safetensors header, padded."""
    parts: int
    """How many parts make it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge, ready to run: frozen, no closures, JSON round-trips."""

    semantics_version: int
    """See :data:`SEMANTICS_VERSION`."""
    shards: tuple[Shard, ...]
    """The output files with weights."""
    parts: tuple[Part, ...]
    """What makes them, shard by shard, in order."""
    part_ids: tuple[str, ...]
    """Their ids, as :func:`workers.task.part_id` gives them."""
    surveys: tuple[Survey, ...]
    """What must be known before some of the parts."""
    weight_map: dict[str, str]
    """Tensor name to shard name."""
    total_size: int
    """Bytes of all tensors."""
    notices: tuple[str, ...]
    """What the user should know."""
    price: Price
    """What it costs."""
    digest: str
    """Hex SHA-256 that two plans share only when they make the same bytes of the same parts."""
    stages: tuple[Plan, ...] = ()
    """Plans of earlier merges that are carried out before, in this order: their shards are hidden, and read by later
    ones."""
    together: Price | None = None
    """What all of that costs, where there are any."""

    @property
    def whole(self) -> tuple[Plan, ...]:
        """All that is carried out, in order."""
        return (*self.stages, self)

    @property
    def total(self) -> Price:
        """What all of that costs."""
        return self.together or self.price

    @property
    def index(self) -> str:
        """The text of ``model.safetensors.index.json``, the commit marker."""
        document = {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


PLAN = TypeAdapter(Plan)


def make_plan(
    recipe: Recipe, inputs: Inputs, options: PlanOptions, baseline_bytes: int = BASELINE_BYTES
) -> Plan:
    """Plan a merge.

    :raises PlanError: lists everything about the inputs that makes the merge impossible.
    """
    plan, problems = draft_plan(recipe, inputs, options, baseline_bytes)
    if plan is None or problems:
        raise PlanError(*problems)
    return plan


def draft_plan(
    recipe: Recipe, inputs: Inputs, options: PlanOptions, baseline_bytes: int = BASELINE_BYTES
) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan of what fits together, when anything does, and all that keeps it from being run."""
    matched = match(recipe, inputs)
    problems = list(matched.problems)
    if not inputs.reference.tensors:
        problems.append(f"{inputs.reference.uri} holds no tensors")
    if not matched.tensors:
        return None, tuple(problems)
    if recipe.output_kind == "adapter":
        drafted = draft(recipe, inputs.reference, matched.tensors)
        problems += drafted.problems
        if not drafted.pieces:
            return None, tuple(problems)
        as_adapter = _adapter(drafted, matched, options, baseline_bytes)
        return as_adapter, (*problems, *_excesses(as_adapter, options, baseline_bytes))
    plan, excesses = lay_out(recipe, matched, options, baseline_bytes)
    return plan, (*problems, *excesses)


def lay_out(
    recipe: Recipe,
    matched: Match,
    options: PlanOptions,
    baseline_bytes: int = BASELINE_BYTES,
    prefix: str = "",
) -> tuple[Plan | None, list[str]]:
    """The plan of tensors that are matched, when there can be one, and what keeps it from being run.

    :param prefix: what the names of the shards begin with.
    """
    if differing := survey_problem(matched.tensors):
        return None, [differing]
    plan = _laid_out(recipe, matched, options, baseline_bytes, prefix)
    return plan, _excesses(plan, options, baseline_bytes)


def with_stages(plan: Plan, stages: Sequence[Plan], notices: Sequence[str]) -> Plan:
    """A plan with those that are carried out before it, and what the user should know of them."""
    if stages:
        identity = digest([plan.digest, *(stage.digest for stage in stages)])
        plans = (*stages, plan)
        together = combined([each.price for each in plans], (part for each in plans for part in each.parts))
        plan = replace(plan, stages=tuple(stages), digest=identity, together=together)
    return replace(plan, notices=(*notices, *plan.notices)) if notices else plan


def _laid_out(recipe: Recipe, matched: Match, options: PlanOptions, baseline_bytes: int, prefix: str) -> Plan:
    most = 1 + recipe.most_inputs
    limits = _limits(options, most, baseline_bytes)
    groups = shards_of(matched.tensors, options.shard_bytes)
    shards: list[Shard] = []
    parts: list[Part] = []
    surveys: list[Survey] = []
    weight_map: dict[str, str] = {}
    together = model_survey(matched.tensors, SEMANTICS_VERSION)
    counted: list[MergePiece] = []
    for number, group in enumerate(groups, start=1):
        name = prefix + shard_name(number, len(groups))
        header = HeaderPiece(
            "header", encode(layout((t.name, t.dtype, t.shape) for t in group), {"format": "pt"})
        )
        size = header.nbytes + sum(tensor.nbytes for tensor in group)
        # Two neighbouring parts together exceed the target, or PART_REFS: so this many bytes a part keep within
        # MAX_PARTS.
        pairs = max(1, MAX_PARTS // 2 - 1 - len(group) * most // PART_REFS)
        fitted = replace(limits, part_bytes=max(limits.part_bytes, -(-size // pairs)))
        pieces: list[Piece] = [header]
        for tensor in group:
            cut, survey = pieces_of(tensor, fitted, SEMANTICS_VERSION, together)
            pieces.extend(cut)
            if together and tensor.is_counted:
                counted += [p for p in cut if isinstance(p, MergePiece) and p.survey == together]
            surveys.extend([survey] if survey else [])
            weight_map[tensor.name] = name
        made = _parts(name, pieces, fitted, options)
        shards.append(Shard(name, size, header.text, len(made)))
        parts.extend(made)
    if together:
        surveys.append(survey_together(together, counted, limits))
    if recipe.profile is not None:
        said: tuple[str, ...] = (f"semantics follow the profile `{recipe.profile}`",)
    else:
        said = _differences(recipe, matched)
    notices = (*said, *matched.notices)
    part_ids = tuple(part_id(part) for part in parts)
    weight_map = dict(sorted(weight_map.items()))
    files = [[shard.name, shard.size] for shard in shards]
    survey_ids = [survey.id for survey in surveys]
    return Plan(
        semantics_version=SEMANTICS_VERSION,
        shards=tuple(shards),
        parts=tuple(parts),
        part_ids=part_ids,
        surveys=tuple(surveys),
        weight_map=weight_map,
        total_size=sum(tensor.nbytes for tensor in matched.tensors),
        notices=notices,
        price=price(parts, surveys, len(shards), baseline_bytes, options.worker_memory_bytes),
        digest=digest([SEMANTICS_VERSION, files, part_ids, survey_ids, weight_map]),
    )


def _adapter(drafted: Drafted, matched: Match, options: PlanOptions, baseline_bytes: int) -> Plan:
    """The plan of an adapter: one file, in which each piece makes both factors of one weight."""
    header = drafted.header
    pieces: list[Piece] = [header, *drafted.pieces]
    most = max(len(piece.refs) for piece in drafted.pieces)
    limits = _limits(options, most, baseline_bytes)
    size = sum(piece.nbytes for piece in pieces)
    fitted = replace(limits, part_bytes=max(limits.part_bytes, -(-size // (MAX_PARTS // 2 - 1))))
    parts = tuple(_parts(WEIGHTS, pieces, fitted, options))
    weight_map = {name: WEIGHTS for piece in drafted.pieces for name in piece.names}
    weight_map = dict(sorted(weight_map.items()))
    part_ids = tuple(part_id(part) for part in parts)
    return Plan(
        semantics_version=SEMANTICS_VERSION,
        shards=(Shard(WEIGHTS, size, header.text, len(parts)),),
        parts=parts,
        part_ids=part_ids,
        surveys=(),
        weight_map=weight_map,
        total_size=sum(piece.nbytes for piece in drafted.pieces),
        notices=(*matched.notices, *drafted.notices),
        price=price(parts, [], 1, baseline_bytes, options.worker_memory_bytes),
        digest=digest([SEMANTICS_VERSION, [[WEIGHTS, size]], part_ids, [], weight_map]),
    )


def plan_summary(plan: Plan, gpu_memory_bytes: int = 0) -> dict[str, Any]:
    """What ``POST /v1/plans`` tells: the price, the files and the notices, without the parts.

    :param gpu_memory_bytes: memory of each GPU of the deployment; where there is none, no device memory is priced.
    """
    price = plan.total if gpu_memory_bytes else replace(plan.total, gpu_bytes=0)
    return {
        "digest": plan.digest,
        "semantics_version": plan.semantics_version,
        "price": TypeAdapter(Price).dump_python(price, mode="json"),
        "shards": [{"name": s.name, "size": s.size, "parts": s.parts} for s in plan.shards],
        "tensors": len(plan.weight_map),
        "total_size": plan.total_size,
        "notices": list(plan.notices),
    }


def _differences(recipe: Recipe, matched: Match) -> tuple[str, ...]:
    """What another profile would have made of the recipe, where that is something else."""
    method = get_method(recipe.merge_method)
    used = {}
    for tensor in matched.tensors:
        of = tensor.source
        if isinstance(of, Arithmetic) and of.method == method.name:  # equal parameters are the same objects
            for model in of.models:
                used[id(of.parameters), id(model.parameters)] = of.parameters | model.parameters
    found = differences(method, used.values())
    return (found,) if found else ()


def _limits(options: PlanOptions, inputs: int, baseline_bytes: int) -> Limits:
    free = options.worker_memory_bytes - baseline_bytes - workspace_bytes(inputs)
    # A part may begin with up to 5 MiB of neighbours before a tensor that fills all the rest.
    # Float32 inputs and output are the widest that a byte of bfloat16 output can cost.
    reserve = MIN_PART_BYTES * (1 + 2 * inputs)
    return Limits(options.part_bytes, options.whole_tensor_bytes, max(0, free - reserve))


def _parts(shard: str, pieces: list[Piece], limits: Limits, options: PlanOptions) -> list[Part]:
    made: list[Part] = []
    offset = 0
    for group in pack(pieces, limits.part_bytes, limits.packed_bytes, held_by):
        part = Part(shard, len(made) + 1, offset, tuple(group), SEMANTICS_VERSION, options.allow_nonfinite)
        made.append(part)
        offset += part.nbytes
    return made


def _excesses(plan: Plan, options: PlanOptions, baseline_bytes: int) -> list[str]:
    """Where the plan goes beyond what workers and object stores can take."""
    problems = []
    if plan.price.peak_bytes > options.worker_memory_bytes:
        problems.append(
            f"the biggest task ({plan.price.worst}) needs {plan.price.peak_bytes / MIB:.0f} MiB, of which "
            f"{baseline_bytes / MIB:.0f} MiB are the worker itself, but worker_memory_bytes allows "
            f"{options.worker_memory_bytes / MIB:.0f} MiB: raise it to at least {plan.price.peak_bytes}"
        )
    for shard in plan.shards:
        if shard.parts > MAX_PARTS:
            problems.append(
                f"{shard.name} would need {shard.parts} parts, object stores allow {MAX_PARTS}: "
                "lower shard_bytes or raise part_bytes and worker_memory_bytes"
            )
    return problems
