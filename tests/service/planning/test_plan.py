"""Plans: every byte of the output made exactly once, within S3's limits and the memory budget, always the same."""

from __future__ import annotations

import json
import resource
import statistics
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.planning.layout import GRAIN_ELEMENTS, PART_REFS
from service.planning.pairing import Inputs
from service.planning.plan import PLAN, Plan, PlanOptions, make_plan, plan_summary
from service.planning.price import (
    BASELINE_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    PIECE_BYTES,
    REF_BYTES,
    workspace_bytes,
)
from service.recipe import Recipe
from tests.service.headers import Spec, alike, checkpoint, inputs_of, llama, recipe_of
from tests.service.planning.plan_checks import check
from workers.errors import PlanError
from workers.safetensors_format import parse
from workers.task import (
    DTYPE_BYTES,
    SURVEY_ELEMENTS,
    MergePiece,
    part_id,
)

pytestmark = pytest.mark.fast

MIB = 1 << 20
BIG = PlanOptions(worker_memory_bytes=1 << 50)

SIZES = st.one_of(
    st.sampled_from([(), (0,), (3, 0), (1,), (1, 1), (7,)]),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(st.sampled_from([SURVEY_ELEMENTS, GRAIN_ELEMENTS, 3 * GRAIN_ELEMENTS]), st.integers(1, 40)),
    st.tuples(st.integers(1, 300_000_000)),
)
SPECS = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "F16", "I64", "BOOL", "F64", "F8_E4M3"]), SIZES),
    min_size=1,
    max_size=12,
).map(lambda found: {f"t{number}": tensor for number, tensor in enumerate(found)})
TRIMMING = st.sampled_from(["ties", "dare_ties"])
RECIPES = st.one_of(
    st.builds(
        recipe_of,
        st.sampled_from(["ties", "dare_ties", "dare_linear", "task_arithmetic"]),
        st.integers(1, 16),
        out_dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    ),
    st.builds(recipe_of, st.just("ties"), st.integers(1, 16), st.just({"density": 0.3, "equal_magnitudes": "exact_k"})),
    st.builds(recipe_of, TRIMMING, st.integers(1, 8), st.just({"density": 0.3}), profile=st.just("paper")),
    st.builds(recipe_of, st.just("dare_linear"), st.integers(1, 4), st.just({"density": 0.3, "rescale": "l1"})),
    st.builds(recipe_of, st.just("linear"), st.integers(1, 16), out_dtype=st.sampled_from([None, "bfloat16"])),
    st.builds(recipe_of, st.just("slerp"), st.just(2), st.just({"t": 0.4})),
    st.builds(recipe_of, st.just("passthrough"), st.just(1), out_dtype=st.sampled_from([None, "float16"])),
)  # fmt: skip
OPTIONS = st.builds(
    PlanOptions,
    shard_bytes=st.sampled_from([1, 40 * MIB, 700 * MIB, 5_000_000_000, 1 << 42]),
    part_bytes=st.one_of(
        st.sampled_from([MIN_PART_BYTES, 64 * MIB, 1 << 30]), st.integers(MIN_PART_BYTES, 300 * MIB)
    ),
    whole_tensor_bytes=st.one_of(
        st.sampled_from([MIN_PART_BYTES, 256 * MIB]), st.integers(MIN_PART_BYTES, 1 << 30)
    ),
    worker_memory_bytes=st.one_of(
        st.sampled_from([1 << 31, 1 << 50]),
        st.integers(BASELINE_BYTES + 100 * MIB, BASELINE_BYTES + 900 * MIB),
    ),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES, SPECS, OPTIONS)
def test_every_byte_is_made_once_within_all_limits(recipe: Recipe, spec: Spec, options: PlanOptions) -> None:
    inputs = alike(recipe, spec)
    try:
        plan = make_plan(recipe, inputs, options)
    except PlanError as error:
        assert all("worker_memory_bytes" in problem for problem in error.problems)
        inputs_count = len(recipe.models) + 1
        smallest = BASELINE_BYTES + workspace_bytes(inputs_count) + inputs_count * 45 * MIB
        assert options.worker_memory_bytes < smallest, "a plan that fits was refused"
        event("refused")
        return
    event(f"accepted, {min(len(plan.surveys), 2)} surveys, {min(len(plan.parts), 3)} parts")
    check(plan, options, spec, recipe)
    text = PLAN.dump_json(plan)
    assert PLAN.validate_json(text) == plan
    assert PLAN.dump_json(make_plan(recipe, inputs, options)) == text
    assert plan.part_ids == tuple(part_id(part) for part in plan.parts)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear", "slerp", "passthrough"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (1 << 31,), (1 << 19, 4099)])
def test_every_shape_alone(method: str, shape: tuple[int, ...]) -> None:
    parameters = {"t": 0.5} if method == "slerp" else {"density": 0.2} if "ties" in method else {}
    recipe = recipe_of(method, {"slerp": 2, "passthrough": 1}.get(method, 3), parameters)
    spec = {"only": ("BF16", shape)}
    check(make_plan(recipe, alike(recipe, spec), PlanOptions()), PlanOptions(), spec, recipe)


def test_small_neighbours_share_a_part_and_a_part_aims_at_its_size() -> None:
    recipe = recipe_of("linear", 2)
    spec = {f"t{number:03}": ("F32", (1 << 18,)) for number in range(256)}  # 1 MiB each
    plan = make_plan(recipe, alike(recipe, spec), PlanOptions())
    sizes = [part.nbytes for part in plan.parts]
    assert len(sizes) == 5  # the header makes the first part 63 tensors long
    assert all(63 * MIB < size <= 64 * MIB for size in sizes[:-1])
    assert (
        plan.price.requests == 5 * (2 * 4 + 1) - 2 * 3
    )  # 64 MiB of neighbours in 16 MiB reads, twice; and a put


def test_small_tensors_share_a_part_up_to_its_inputs_and_tiny_ones_up_to_its_minimum() -> None:
    recipe = recipe_of("linear", 4)
    small = make_plan(recipe, alike(recipe, {f"t{n}": ("F32", (16384,)) for n in range(5000)}), BIG)
    counts = [len(part.refs) for part in small.parts]
    assert counts == [PART_REFS] * 19 + [4 * 5000 - 19 * PART_REFS]
    tiny = make_plan(recipe, alike(recipe, {f"t{n}": ("F32", (256,)) for n in range(12000)}), BIG)
    assert len(tiny.parts) == 3  # of 1 KiB, the header in the first
    assert all(MIN_PART_BYTES <= part.nbytes <= MIN_PART_BYTES + 1024 for part in tiny.parts[:-1])
    check(tiny, BIG, {f"t{n}": ("F32", (256,)) for n in range(12000)}, recipe)


def test_what_describes_tiny_tensors_is_priced_and_can_be_too_much() -> None:
    recipe = recipe_of("linear", 4)
    inputs = alike(recipe, {f"t{n}": ("F32", (1,)) for n in range(20000)})
    priced = make_plan(recipe, inputs, BIG).price.peak_bytes
    assert priced - BASELINE_BYTES - workspace_bytes(4) > 20000 * (PIECE_BYTES + 4 * REF_BYTES)
    with pytest.raises(PlanError, match=f"raise it to at least {priced}"):
        make_plan(recipe, inputs, PlanOptions(worker_memory_bytes=priced - 1))


@pytest.mark.parametrize(
    ("mib", "density", "survey", "pieces"),
    [(256, 0.3, False, 1), (258, 0.3, True, 5), (258, 1, False, 5), (64, 1, False, 1), (66, 1, False, 2)],
)
def test_a_tensor_that_needs_a_survey_stays_whole_up_to_256_mib(
    mib: int, density: float, survey: bool, pieces: int
) -> None:
    recipe = recipe_of("ties", 2, {"density": density})
    spec = {"big": ("F32", (mib << 18,))}
    plan = make_plan(recipe, alike(recipe, spec), BIG)
    assert bool(plan.surveys) is survey
    found = [piece for part in plan.parts for piece in part.pieces if isinstance(piece, MergePiece)]
    assert len(found) == pieces
    assert plan.price.most_reads == (3 if survey else 1)
    assert plan.price.surveyed_tensors == int(survey)


def test_little_memory_splits_what_would_be_whole_and_too_little_says_how_much_it_takes() -> None:
    recipe = recipe_of("ties", 4, {"density": 0.3})
    inputs = alike(recipe, {"model.big.weight": ("BF16", (100 << 20,)), "small": ("BF16", (5,))})
    assert not make_plan(recipe, inputs, BIG).surveys
    tight = PlanOptions(worker_memory_bytes=1 << 30)
    assert make_plan(recipe, inputs, tight).surveys
    assert make_plan(recipe, inputs, tight).price.peak_bytes <= 1 << 30
    with pytest.raises(PlanError, match=r"model\.big\.weight.*raise it to at least (\d+)") as caught:
        make_plan(recipe, inputs, PlanOptions(worker_memory_bytes=500 * MIB))
    needed = int(str(caught.value).rsplit(" ", 1)[-1])
    assert make_plan(recipe, inputs, PlanOptions(worker_memory_bytes=needed)).price.peak_bytes <= needed


def test_a_huge_shard_has_bigger_parts_instead_of_too_many() -> None:
    recipe = recipe_of("linear", 1)
    spec = {f"t{number}": ("BF16", (1 << 30, 9)) for number in range(5)}  # 90 GiB
    options = PlanOptions(shard_bytes=1 << 40, part_bytes=MIN_PART_BYTES)
    plan = make_plan(recipe, alike(recipe, spec), options)
    assert len(plan.shards) == 1
    assert MAX_PARTS // 3 < plan.shards[0].parts <= MAX_PARTS
    check(plan, options, spec, recipe)


def test_tensors_a_little_over_half_a_part_do_not_make_twice_too_many_parts() -> None:
    recipe = recipe_of("linear", 1)
    spec = {
        f"t{number}": ("BF16", (6 << 19,)) for number in range(11_000)
    }  # 6 MiB each: one in 7.7 MB, two in 13.8
    options = PlanOptions(shard_bytes=1 << 40, part_bytes=MIN_PART_BYTES)
    assert make_plan(recipe, alike(recipe, spec), options).shards[0].parts == 5_500


def test_a_shard_that_memory_does_not_let_fit_in_10000_parts_is_refused_with_what_to_change() -> None:
    recipe = recipe_of("linear", 8)
    spec = {f"t{number}": ("BF16", (1 << 30, 9)) for number in range(5)}
    options = PlanOptions(
        shard_bytes=1 << 40, part_bytes=MIN_PART_BYTES, worker_memory_bytes=BASELINE_BYTES + 240 * MIB
    )
    with pytest.raises(
        PlanError, match=r"model-00001-of-00001\.safetensors would need \d+ parts.*lower shard_bytes"
    ):
        make_plan(recipe, alike(recipe, spec), options)


def test_shards_are_named_as_hugging_face_names_them_and_filled_in_order() -> None:
    recipe = recipe_of("linear", 1)
    spec = dict.fromkeys("abcde", ("F32", (25,)))
    plan = make_plan(recipe, alike(recipe, spec), PlanOptions(shard_bytes=200))
    assert [shard.name for shard in plan.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert plan.weight_map == {
        name: f"model-0000{1 + i // 2}-of-00003.safetensors" for i, name in enumerate("abcde")
    }
    assert json.loads(plan.index) == {"metadata": {"total_size": 500}, "weight_map": plan.weight_map}
    single = make_plan(recipe, alike(recipe, spec), PlanOptions())
    assert [shard.name for shard in single.shards] == ["model-00001-of-00001.safetensors"]


def test_a_byte_wide_tensor_between_floats_leaves_all_of_them_aligned() -> None:
    recipe = recipe_of("linear", 1)
    spec = {
        "a": ("BOOL", (3,)),
        "b": ("F32", (5,)),
        "c": ("BF16", (1,)),
        "d": ("I64", (2,)),
        "e": ("F32", ()),
    }
    plan = make_plan(recipe, alike(recipe, spec), PlanOptions())
    header = parse(plan.shards[0].header.encode(), plan.shards[0].size)
    assert [entry.name for entry in header.entries] == ["d", "b", "e", "c", "a"]
    assert all((header.data_start + entry.start) % DTYPE_BYTES[entry.dtype] == 0 for entry in header.entries)


def plan_of(parameters: dict[str, Any] | None = None, **changes: Any) -> Plan:
    etags = changes.pop("etags", None)
    options = changes.pop("options", PlanOptions())
    recipe = recipe_of("ties", 2, {"density": 0.3} | (parameters or {}), **changes)
    return make_plan(recipe, alike(recipe, {"w": ("F32", (90 << 20,)), "b": ("I64", (4,))}, etags), options)


def test_the_digest_changes_with_the_inputs_and_what_is_asked_and_with_nothing_else() -> None:
    plan = plan_of()
    assert plan_of(options=PlanOptions(overwrite=True)).digest == plan.digest
    assert (
        plan_of(options=PlanOptions(worker_memory_bytes=1 << 40, part_bytes=64 * MIB)).shards == plan.shards
    )
    assert plan_of(extra_tensors="drop").digest == plan.digest
    others = [
        plan_of(etags={"/m1": "new"}),
        plan_of(etags={"/base": "new"}),
        plan_of(seed=1),
        plan_of(parameters={"lambda": 0.5}),
        plan_of(models=[{"model": "/m1"}, {"model": "/m0"}]),
        plan_of(models=[{"model": "/m0"}, {"model": "/m1", "parameters": {"weight": 0.9}}]),
        plan_of(out_dtype="bfloat16"),
        plan_of(options=PlanOptions(part_bytes=32 * MIB)),
        plan_of(options=PlanOptions(shard_bytes=100)),
        plan_of(options=PlanOptions(allow_nonfinite=True)),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_a_summary_has_the_price_and_no_parts() -> None:
    summary = plan_summary(plan_of())
    assert json.loads(json.dumps(summary)) == summary
    assert summary["tensors"] == 2
    assert summary["price"]["parts"] == sum(shard["parts"] for shard in summary["shards"])
    assert len(json.dumps(summary)) < 2_000
    assert summary["price"]["gpu_bytes"] == 0  # nobody has said that there are any
    assert plan_summary(plan_of(), 80 << 30)["price"]["gpu_bytes"] == plan_of().price.gpu_bytes > 0


def test_a_checkpoint_without_tensors_and_one_with_problems_are_refused() -> None:
    recipe = recipe_of("linear", 1)
    with pytest.raises(PlanError, match="holds no tensors"):
        make_plan(recipe, alike(recipe, {}), PlanOptions())
    recipe = recipe_of("linear", 2)
    made = {f"/m{i}": checkpoint(f"file:///m{i}", {"w": ("F32", (i + 1,))}) for i in range(2)}
    with pytest.raises(PlanError, match="shape differs"):
        make_plan(recipe, inputs_of(recipe, made), PlanOptions())


def test_a_thousand_tensors_of_four_models_are_planned_in_well_under_a_second() -> None:
    recipe = recipe_of("ties", 4, {"density": 0.5})
    spec = {f"layers.{i}.weight": ("BF16", (1024, 4096) if i % 3 else (4096,)) for i in range(1000)}
    inputs = alike(recipe, spec)
    seconds = [seconds_of(recipe, inputs)[0] for _ in range(3)]
    assert statistics.median(seconds) < 1, seconds


@pytest.mark.parametrize("profile", [None, "paper"])
def test_llama_405b_of_eight_models_is_planned_in_seconds_and_in_little_memory(profile: str | None) -> None:
    recipe = recipe_of("ties", 8, {"density": 0.5}, **({"profile": profile} if profile else {}))
    inputs = alike(recipe, llama(126, 16384, 53248, 1024, 128256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, plan = seconds_of(recipe, inputs)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert plan.price.bytes_written > 800e9
    assert max(shard.parts for shard in plan.shards) < 200
    assert seconds < 20, seconds  # 4 to 6 on an idle core
    assert grown < 1 << 30


def seconds_of(recipe: Recipe, inputs: Inputs) -> tuple[float, Plan]:
    started = time.process_time()
    plan = make_plan(recipe, inputs, PlanOptions())
    return time.process_time() - started, plan
