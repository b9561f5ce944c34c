"""Everything that a plan promises, worked out without the code that makes plans."""

from __future__ import annotations

import math
from itertools import groupby, pairwise

from service.planning.checkpoint import TIED_NAMES
from service.planning.plan import Plan, PlanOptions, Shard
from service.planning.price import MAX_PARTS, MIN_PART_BYTES, part_peak_bytes, survey_peak_bytes
from service.recipe import Recipe
from tests.service.headers import Spec
from workers.binding import bind
from workers.safetensors_format import Entry, Header, parse
from workers.task import (
    BLOCK_BYTES,
    DTYPE_BYTES,
    MERGEABLE_DTYPES,
    SURVEY_ELEMENTS,
    CopyPiece,
    HeaderPiece,
    MergePiece,
    Part,
    Survey,
    part_id,
)


def check(plan: Plan, options: PlanOptions, spec: Spec, recipe: Recipe) -> None:
    """Everything that a plan promises, worked out without the code that makes plans."""
    check_surveys(plan)
    position = 0
    for shard in plan.shards:
        parts = [part for part in plan.parts if part.shard == shard.name]
        assert list(plan.parts[position : position + shard.parts]) == parts
        position += shard.parts
        header = check_shard(shard, parts, {survey.id: survey for survey in plan.surveys})
        assert sum(e.nbytes for e in header.entries) <= options.shard_bytes or len(header.entries) == 1
        for entry in header.entries:
            dtype, shape = spec[entry.name]
            assert entry.shape == shape
            assert entry.dtype == (recipe.out_dtype_name or dtype if dtype in MERGEABLE_DTYPES else dtype)
            assert plan.weight_map[entry.name] == shard.name
    assert position == len(plan.parts)
    assert set(plan.weight_map) == set(spec)
    assert all(
        part_peak_bytes(part) <= plan.price.peak_bytes <= options.worker_memory_bytes for part in plan.parts
    )
    assert len({part_id(part) for part in plan.parts}) == len(plan.parts)


def check_shard(shard: Shard, parts: list[Part], surveys: dict[str, Survey]) -> Header:
    """Parts follow one another, and their pieces, put end to end, are the header and the tensors that it lists."""
    header = parse(shard.header.encode(), shard.size)
    assert header.metadata == {"format": "pt"}
    assert len(shard.header.encode()) % 8 == 0
    assert [part.number for part in parts] == list(range(1, shard.parts + 1))
    assert shard.parts <= MAX_PARTS
    assert all(part.nbytes >= MIN_PART_BYTES for part in parts[:-1])
    assert all(0 < part.nbytes <= 5 << 30 for part in parts)
    assert isinstance(parts[0].pieces[0], HeaderPiece)
    queue = [entry for entry in header.entries if entry.nbytes]
    position, within = 0, 0
    for part in parts:
        assert part.offset == position
        for piece in part.pieces:
            if isinstance(piece, HeaderPiece):
                assert (position, piece.nbytes) == (0, header.data_start)
            else:
                entry = queue[0]
                place = (entry.name, header.data_start + entry.start + within, within)
                assert (piece.name, position, piece.offset) == place
                check_piece(piece, entry, surveys)
                within += piece.nbytes
                assert within <= entry.nbytes
                if within == entry.nbytes:
                    queue.pop(0)
                    within = 0
            position += piece.nbytes
    assert (position, queue) == (shard.size, [])
    return header


def check_piece(piece: CopyPiece | MergePiece, entry: Entry, surveys: dict[str, Survey]) -> None:
    assert piece.nbytes > 0
    assert piece.offset % BLOCK_BYTES == 0
    if isinstance(piece, CopyPiece):
        assert piece.ref.dtype == entry.dtype
        return
    run = piece.arithmetic
    assert piece.dtype == entry.dtype
    assert run.first % SURVEY_ELEMENTS == 0
    assert run.numel == math.prod(entry.shape)
    is_whole = (run.first, run.last) == (0, run.numel)
    assert all(ref.nbytes == (run.last - run.first) * DTYPE_BYTES[ref.dtype] for ref in run.refs)
    if piece.survey is None:
        assert not bind(run).passes or (is_whole and bind(run).parameters.survey_scope == "tensor")
    elif bind(run).parameters.survey_scope == "model":
        assert (run.name in surveys[piece.survey].names) == (run.name not in TIED_NAMES)
    else:
        assert not is_whole
        assert surveys[piece.survey].names == {run.name}


def check_surveys(plan: Plan) -> None:
    """Surveys cover their tensors exactly, and are those that the parts wait for."""
    assert {id_ for part in plan.parts for id_ in part.surveys} == {survey.id for survey in plan.surveys}
    for survey in plan.surveys:
        first = survey.tasks[0][0]
        assert survey.passes == len(bind(first).passes) > 0
        assert all(survey_peak_bytes(task) <= plan.price.peak_bytes for task in survey.tasks)
        together = bind(first).parameters.survey_scope == "model"
        runs = sorted((run for task in survey.tasks for run in task), key=lambda run: (run.name, run.first))
        counted = 0
        for name, found in groupby(runs, key=lambda run: run.name):
            own = list(found)
            assert together or name == first.name
            assert (own[0].first, own[-1].last) == (0, own[0].numel)
            for one, two in pairwise(own):
                assert one.last == two.first
                assert two.first % SURVEY_ELEMENTS == 0
            counted += own[0].numel
        assert survey.numel == counted
