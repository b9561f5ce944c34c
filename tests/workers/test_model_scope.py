"""One threshold over a whole model, out of core: the bytes of ``merge_tensors`` however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import Planned
from tests.checkpoints import Tensors, read_checkpoint, write_checkpoint
from tests.workers.execute import MIB, plan, run
from workers.errors import NonFiniteError
from workers.methods import METHODS
from workers.methods.evaluate import merge_tensors
from workers.methods.resolve import resolve_parameters
from workers.random import mask_key
from workers.task import SURVEY_ELEMENTS, MergePiece

NAMES = ["a", "b", "c"]
WHOLE = PlanOptions(worker_memory_bytes=1 << 40)
SPLIT = PlanOptions(part_bytes=5 * MIB, worker_memory_bytes=1 << 40)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int, dtype: torch.dtype, sigma: float = 1e-3, base: Tensors | None = None) -> Tensors:
    """Tensors of many sizes, one of them many parts long, that moved by different amounts from ``base``."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11 * SURVEY_ELEMENTS + 3,),
        "still": (70, 900),
        "scalar": (),
        "none": (0, 3),
        "tail": (SURVEY_ELEMENTS + 1,),
    }
    shapes |= {f"norm.{number}": (33 + number,) for number in range(40)}
    found: Tensors = {}
    for name, shape in shapes.items():
        moved = torch.randn(shape, generator=generator) * (sigma / 8 if name == "still" else sigma)
        own = torch.zeros(shape) if base is None else base[name].float()
        found[name] = (own + moved).to(dtype)
    return found


def wanted(
    root: Path, method: str, parameters: dict[str, Any], base: Tensors, models: list[Tensors]
) -> dict[str, torch.Tensor]:
    """What the same merge in memory gives."""
    resolved, own = resolve_parameters(METHODS[method], "paper", parameters, [{}] * len(models))
    keys = {name: [mask_key(0, index, name) for index in range(len(models))] for name in base}
    return merge_tensors(METHODS[method], resolved, own, base, models, mask_keys=keys)


def assert_merged(
    planned: Planned, output: Path, expected: dict[str, torch.Tensor], order: int
) -> list[bytes]:
    done = run(planned, output, order=order)
    write_index(output, planned)
    found = read_checkpoint(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    return done.shards()


def write_index(output: Path, planned: Planned) -> None:
    (output / "model.safetensors.index.json").write_text(planned.plan.index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.2}), ("dare_ties", {"density": 0.5, "trim_density": 0.2})],
)
def test_it_gives_what_the_whole_in_memory_gives(
    method: str, parameters: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    base = model(0, DTYPES[dtype], 0.02)
    models = [model(seed, DTYPES[dtype], base=base) for seed in (1, 2, 3)]
    # Shards of the inputs lie differently in each, and in the output.
    write_checkpoint(tmp_path / "base", base)
    for number, (name, tensors) in enumerate(zip(NAMES, models, strict=True)):
        write_checkpoint(tmp_path / name, tensors, shard_bytes=(number + 1) * MIB)
    expected = wanted(tmp_path, method, parameters, base, models)
    for number, options in enumerate(
        [
            WHOLE,
            SPLIT.model_copy(update={"shard_bytes": 4 * MIB}),
            SPLIT.model_copy(update={"part_bytes": 1 << 30, "worker_memory_bytes": 160 * MIB}),
        ]
    ):
        planned = plan(tmp_path, method, NAMES, parameters, options, profile="paper")
        (survey,) = planned.plan.surveys
        assert (survey.passes, len(survey.names)) == (3, len(base) - 1)
        assert len(survey.tasks) == 1 if options is WHOLE else len(survey.tasks) > 1
        assert_merged(planned, tmp_path / f"out{number}", expected, order=number)


def test_a_tied_duplicate_counts_once(tmp_path: Path) -> None:
    base = model(0, torch.float32, 0.02)
    models = [model(seed, torch.float32, base=base) for seed in (1, 2)]
    config = {"tie_word_embeddings": True}
    stored = [
        each | {"lm_head.weight": each["model.embed_tokens.weight"].clone()} for each in (base, *models)
    ]
    for name, tensors in zip(["base", "a", "b"], stored, strict=True):
        write_checkpoint(tmp_path / name, tensors, config)
    expected = wanted(tmp_path, "ties", {"density": 0.2}, base, models)
    twice = wanted(tmp_path, "ties", {"density": 0.2}, stored[0], stored[1:])
    assert not torch.equal(twice["tail"], expected["tail"])
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    planned = plan(tmp_path, "ties", ["a", "b"], {"density": 0.2}, SPLIT, profile="paper")
    assert_merged(planned, tmp_path / "out", expected, order=1)


def test_the_price_counts_every_pass_and_buffers_once(tmp_path: Path) -> None:
    base = model(0, torch.bfloat16, 0.02) | {"position_ids": torch.arange(5)}
    for name in ("base", "a"):
        write_checkpoint(tmp_path / name, base)
    planned = plan(tmp_path, "ties", ["a"], {"density": 0.2}, SPLIT, profile="paper")
    price = planned.plan.price
    elements = sum(tensor.numel() for tensor in base.values()) - 5
    assert price.bytes_read == 4 * 2 * 2 * elements + 5 * 8
    waiting = [part for part in planned.plan.parts if part.surveys]
    assert all(any(isinstance(piece, MergePiece) for piece in part.pieces) for part in waiting)


def test_what_is_not_finite_is_named_by_the_survey_and_left_out_of_it_when_it_is_allowed(
    tmp_path: Path,
) -> None:
    base = model(0, torch.float32, 0.02)
    tuned = [model(seed, torch.float32, base=base) for seed in (1, 2)]
    poisoned = [dict(each) for each in tuned]
    poisoned[0]["norm.3"] = tuned[0]["norm.3"].clone()
    poisoned[0]["norm.3"][5] = torch.nan
    poisoned[1]["tail"] = tuned[1]["tail"].clone()
    poisoned[1]["tail"][-1] = torch.inf
    for name, tensors in zip(["base", "a", "b"], [base, *poisoned], strict=True):
        write_checkpoint(tmp_path / name, tensors)
    with pytest.raises(NonFiniteError) as caught:
        run(plan(tmp_path, "ties", ["a", "b"], {"density": 0.2}, WHOLE, profile="paper"), tmp_path / "none")
    assert "tensor 'norm.3' of" in str(caught.value)
    assert "tensor 'tail' of" in str(caught.value)
    allowed = SPLIT.model_copy(update={"allow_nonfinite": True})
    planned = plan(tmp_path, "ties", ["a", "b"], {"density": 0.2}, allowed, profile="paper")
    done = run(planned, tmp_path / "out")
    counts: dict[str, int] = {}
    for result in done.results:
        counts |= result.nonfinite
    assert sorted(key.split(":")[0] for key in counts) == ["norm.3", "tail"]
    write_index(tmp_path / "out", planned)
    found = read_checkpoint(tmp_path / "out")
    expected = wanted(tmp_path, "ties", {"density": 0.2}, base, poisoned)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
