"""Plans with one threshold for the whole model: one survey of all tensors, in few tasks, that all pieces wait for."""

from __future__ import annotations

from typing import Any

import pytest

from service.planning.layout import PART_REFS
from service.planning.plan import Plan, PlanOptions, make_plan
from service.planning.price import BASELINE_BYTES, survey_peak_bytes
from tests.service.headers import Spec, alike, checkpoint, inputs_of, recipe_of
from tests.service.planning.plan_checks import check
from workers.task import MergePiece

pytestmark = pytest.mark.fast

MIB = 1 << 20
BIG = PlanOptions(worker_memory_bytes=1 << 50)


def paper_plan(spec: Spec, options: PlanOptions = BIG, parameters: dict[str, Any] | None = None) -> Plan:
    recipe = recipe_of("ties", 2, {"density": 0.5} | (parameters or {}), profile="paper")
    plan = make_plan(recipe, alike(recipe, spec), options)
    check(plan, options, spec, recipe)
    return plan


MIXED: dict[str, tuple[str, tuple[int, ...]]] = {
    "big": ("BF16", (300_000_000,)),
    "buffer": ("I64", (7,)),
    "none": ("BF16", (0, 4)),
    **{f"norm.{number}": ("BF16", (4096,)) for number in range(900)},
}


def test_a_survey_of_the_whole_model_is_one_and_every_merged_piece_waits_for_it() -> None:
    plan = paper_plan(MIXED)
    (survey,) = plan.surveys
    merges = [piece for part in plan.parts for piece in part.pieces if isinstance(piece, MergePiece)]
    assert {piece.survey for piece in merges} == {survey.id}
    assert {piece.name for piece in merges} == survey.names == set(MIXED) - {"buffer", "none"}
    assert survey.numel == 300_000_000 + 900 * 4096
    assert sum(run.last - run.first for task in survey.tasks for run in task) == survey.numel
    assert plan.price.surveyed_tensors == 901
    assert (survey.passes, plan.price.most_reads) == (3, 4)
    assert plan.price.survey_tasks == 3 * len(survey.tasks)
    merged_bytes = plan.price.input_bytes - 7 * 8
    assert plan.price.bytes_read == 4 * merged_bytes + 7 * 8


def test_small_tensors_share_survey_tasks_as_they_share_parts_and_big_ones_are_cut_as_parts_are() -> None:
    (survey,) = paper_plan(MIXED).surveys
    runs = [run for task in survey.tasks for run in task]
    assert max(run.last - run.first for run in runs) * 2 <= 64 * MIB
    assert len([run for run in runs if run.name == "big"]) == 9  # it fits whole_tensor_bytes no better
    assert len(survey.tasks) <= 9 + 900 * 3 // PART_REFS + 1
    assert all(sum(len(run.refs) for run in task) <= PART_REFS for task in survey.tasks)


def test_a_survey_of_the_whole_model_keeps_within_little_memory() -> None:
    tight = PlanOptions(worker_memory_bytes=BASELINE_BYTES + 300 * MIB)
    plan = paper_plan(MIXED, tight)
    (survey,) = plan.surveys
    assert max(survey_peak_bytes(task) for task in survey.tasks) <= tight.worker_memory_bytes
    assert len(survey.tasks) > 9


def test_the_surveys_id_is_what_it_is_taken_of() -> None:
    (survey,) = paper_plan(MIXED).surveys
    (cut,) = paper_plan(MIXED, PlanOptions(part_bytes=32 * MIB)).surveys
    assert cut.id == survey.id
    assert len(cut.tasks) > len(survey.tasks)
    others: list[Spec] = [MIXED | {"more": ("BF16", (1,))}, MIXED | {"norm.0": ("BF16", (4095,))}]
    found = {paper_plan(spec).surveys[0].id for spec in others} | {survey.id}
    found.add(paper_plan(MIXED, parameters={"density": 0.4}).surveys[0].id)
    assert len(found) == 4


def test_switches_decide_whether_there_is_a_survey_of_the_whole_model_and_how_many_passes_it_has() -> None:
    spec: Spec = {"w": ("BF16", (10,)), "v": ("BF16", (3,))}
    assert paper_plan(spec).price.most_reads == 4
    assert paper_plan(spec, parameters={"zero_sign": "positive"}).price.most_reads == 3
    assert paper_plan(spec, parameters={"density": 1}).price.most_reads == 2  # the majority only
    assert not paper_plan(spec, parameters={"density": 1, "zero_sign": "positive"}).surveys
    assert not paper_plan(spec, parameters={"trim_scope": "tensor"}).surveys  # held whole
    assert not paper_plan({"buffer": ("I64", (7,)), "none": ("BF16", (0,))}).surveys
    recipe = recipe_of("dare_ties", 2, {"density": 0.5, "retrim": False}, profile="paper")
    assert not make_plan(recipe, alike(recipe, spec), BIG).surveys


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_duplicate_is_merged_with_the_models_threshold_but_not_counted_in_it(tied: bool) -> None:
    spec = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight", "w"), ("BF16", (12, 4)))
    recipe = recipe_of("ties", 2, {"density": 0.5}, profile="paper")
    config = {"tie_word_embeddings": tied}
    made = {name: checkpoint(f"file://{name}", spec, config=config) for name in recipe.names}
    plan = make_plan(recipe, inputs_of(recipe, made), BIG)
    (survey,) = plan.surveys
    assert ("lm_head.weight" in survey.names) is not tied
    assert survey.numel == 48 * (2 if tied else 3)
    merges = [piece for part in plan.parts for piece in part.pieces if isinstance(piece, MergePiece)]
    assert [piece.survey for piece in merges] == [survey.id] * 3
