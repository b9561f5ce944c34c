"""Running a method over a tensor, block by block: no I/O, and never more than one block of float32 at a time.

``merge_tensor`` does the whole on tensors in memory. A worker that reads its blocks from elsewhere uses
``survey`` and the method's ``merge``; one that sees only a piece of a tensor uses a pass' ``accumulate``, and
whoever gathers the pieces uses ``conclude_pass``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from workers.kernels.reference import to_float32
from workers.methods.base import Block, Method, Parameters, Summary, SurveyPass
from workers.task import SURVEY_ELEMENTS, Facts

Blocks = Callable[[], Iterable[Block]]
"""Starts over the blocks of one whole tensor, on the grid of ``SURVEY_ELEMENTS``."""


def conclude_pass(survey_pass: SurveyPass, summaries: Sequence[Summary], numel: int, facts: Facts) -> Facts:
    """The facts after a pass, given the summaries of all pieces of the tensor, in any order."""
    return facts | survey_pass.conclude(survey_pass.combine(summaries), numel, facts)


def survey(passes: Sequence[SurveyPass], blocks: Blocks, numel: int) -> Facts:
    """All that ``passes`` find out about a tensor of ``numel`` > 0 elements."""
    facts: Facts = {}
    for survey_pass in passes:
        facts = conclude_pass(survey_pass, [survey_pass.accumulate(blocks(), facts)], numel, facts)
    return facts


def blocks_of(
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    mask_keys: Sequence[int] = (),
    first: int = 0,
    last: int | None = None,
) -> Iterator[Block]:
    """The blocks of the elements ``[first, last)`` of flat tensors; ``last`` of ``None`` is their end.

    The inputs may be float32, bfloat16 or float16, each its own; blocks are float32.
    """
    end = inputs[0].numel() if last is None else last
    for start in range(first, end, SURVEY_ELEMENTS):
        stop = min(start + SURVEY_ELEMENTS, end)
        yield Block(
            first=start,
            base=None if base is None else to_float32(base[start:stop]),
            models=tuple(to_float32(model[start:stop]) for model in inputs),
            mask_keys=tuple(mask_keys),
        )


def merge_tensor(
    method: Method,
    parameters: Parameters,
    models: Sequence[Parameters],
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    *,
    mask_keys: Sequence[int] = (),
) -> torch.Tensor:
    """Survey and merge one whole tensor in memory.

    ``base`` and ``inputs`` are float32, bfloat16 or float16 and of one shape, which the merged float32 tensor
    has too; ``mask_keys`` (one a model) are only read by methods that drop at random.
    """
    shape, numel = inputs[0].shape, inputs[0].numel()
    flat_base = None if base is None else base.reshape(-1)
    flat = [model.reshape(-1) for model in inputs]
    merged = torch.empty(numel, dtype=torch.float32, device=inputs[0].device)
    if numel:
        facts = survey(
            method.survey(parameters, models), lambda: blocks_of(flat_base, flat, mask_keys), numel
        )
        for block in blocks_of(flat_base, flat, mask_keys):
            merged[block.first : block.first + block.models[0].numel()] = method.merge(
                block, parameters, models, facts
            )
    return merged.reshape(shape)
