"""Parts and surveys of operands that are made: the bytes of plain ones that hold the same, cut or not, as priced."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.layout import Limits, pieces_of
from service.planning.matching import OutputTensor
from service.planning.price import part_peak_bytes, price
from tests.workers.made import Objects
from tests.workers.memory import growth
from workers.arena import Arena
from workers.binding import bind
from workers.canonical import PAGE_BYTES
from workers.kernels import kernels_of
from workers.methods.survey import conclude_pass
from workers.run import PartRun, SurveyRun, run_part, run_survey
from workers.sources import (
    JOINED_BYTES,
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    ModelInput,
    RowRun,
    Source,
    TensorRef,
)
from workers.stages import Task, Tools
from workers.store import StoreSettings
from workers.store.base import Upload
from workers.store.local import LocalStore
from workers.store.uris import from_path
from workers.task import PART, Facts, MergePiece, Part, Survey, SurveyTask

MIB = 1 << 20
ROWS, COLUMNS = 1601, 1025
NUMEL = ROWS * COLUMNS
WHOLE = Limits(1 << 40, 1 << 40, 1 << 40)
CUT = Limits(5 * MIB, 5 * MIB, 1 << 40)
STORE = LocalStore()


@dataclass
class Files(Objects):
    """The same objects as files, from which tasks read."""

    root: Path

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, tensor: torch.Tensor, dtype: str, odd: int = 0, uri: str | None = None) -> TensorRef:
        path = self.root / f"m{len(self.bytes)}" / "model.safetensors"
        ref = super().add(tensor, dtype, odd, from_path(str(path)))
        path.parent.mkdir()
        path.write_bytes(self.bytes[ref.uri])
        head = STORE.head(ref.uri)
        assert head is not None
        return replace(ref, etag=head.etag)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("objects"))


def sources(files: Files) -> tuple[list[Source], list[TensorRef]]:
    """A matrix under an adapter, one of gathered rows, one that was merged of both; and files that hold the same."""
    generator = torch.Generator().manual_seed(1)

    def stored(numel: int, dtype: str, odd: int = 0) -> TensorRef:
        return files.add(torch.randn(numel, generator=generator), dtype, odd)

    base, other = stored(NUMEL, "BF16", 1), stored(NUMEL, "F32")
    changes = (
        Change(stored(5 * COLUMNS, "F32"), stored(ROWS * 5, "BF16"), 0.5, False),
        Change(stored(3 * ROWS, "F16"), stored(COLUMNS * 3, "F32", 2), -0.25, True),
    )
    adapted = LowRank("low_rank", base, changes, (ROWS, COLUMNS), 0)
    takes = [((0, (7 * row) % ROWS * COLUMNS),) for row in range(ROWS)]
    takes[3], takes[800], takes[1600] = (), ((0, 0), (1, COLUMNS)), ((1, 2 * COLUMNS),)
    gathered = Gathered("gathered", (adapted, other), tuple(RowRun(COLUMNS, take) for take in takes), "BF16")
    models = (ModelInput(0, adapted, {"weight": 1.0}), ModelInput(1, gathered, {"weight": 0.5}))
    merged = Derived("derived", Arithmetic("s", "linear", {}, None, models, 7, NUMEL, 0, NUMEL), "F32")
    made: list[Source] = [adapted, gathered, merged]
    dtypes = [source.dtype for source in made]
    return made, [files.add(files.value(source), dtype) for source, dtype in zip(made, dtypes, strict=True)]


@pytest.fixture(scope="module")
def both(files: Files) -> tuple[list[Source], list[TensorRef]]:
    return sources(files)


Tasks = tuple[list[Part], list[SurveyTask], dict[str, Facts]]


def cut(whole: Arithmetic, limits: Limits) -> Tasks:
    """The parts of one tensor, its survey's tasks, and what they found."""
    pieces, survey = pieces_of(OutputTensor("w", (ROWS, COLUMNS), "F32", whole, whole.numel), limits, 1)
    offsets = itertools.accumulate((piece.nbytes for piece in pieces), initial=0)
    parts = [
        Part("s", n, at, (piece,), 1) for n, (at, piece) in enumerate(zip(offsets, pieces, strict=False), 1)
    ]
    if survey is None:
        return parts, [], {}
    facts: Facts = {}
    tasks = []
    for index, survey_pass in enumerate(bind(whole).passes):
        if not survey_pass.needed(facts):
            continue
        tasks += [SurveyTask(survey.id, index, runs, facts) for runs in survey.tasks]
        found = [run_survey(task, STORE) for task in tasks[-len(survey.tasks) :]]
        facts = conclude_pass(survey_pass, found, survey.numel, facts)
    return parts, tasks, {survey.id: facts}


def merged(whole: Arithmetic, limits: Limits, root: Path) -> bytes:
    """The bytes of the tensor."""
    parts, _, facts = cut(whole, limits)
    assert (len(parts) > 1) is (limits is CUT)
    upload = opened(parts, root)
    for part in parts:
        run_part(PART.validate_json(PART.dump_json(part)), upload, facts, STORE)
    STORE.complete(upload, STORE.list_parts(upload))
    return (root / "s").read_bytes()


def opened(parts: list[Part], root: Path) -> Upload:
    return STORE.open_upload(from_path(str(root / "s")), sum(part.nbytes for part in parts), {})


METHODS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "passthrough": (1, {}, {}),
    "linear": (3, {}, {"weight": 0.3}),
    "ties": (2, {}, {"weight": 0.7, "density": 0.4}),
    "model_stock": (2, {"filter_wise": True}, {}),
}
"""Of each: models, parameters and the models' own."""


def arithmetic(method: str, operands: list[Source]) -> Arithmetic:
    """A method on operands of the same elements; the last is the base, where it takes one."""
    count, shared, own = METHODS[method]
    models = tuple(ModelInput(k, operands[k % 3], own) for k in range(count))
    base = operands[2] if method in ("ties", "model_stock") else None
    return Arithmetic("w", method, shared, base, models, 7, NUMEL, 0, NUMEL, (ROWS, COLUMNS))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_of_sources_what_it_makes_of_files_that_hold_the_same(
    method: str, both: tuple[list[Source], list[TensorRef]], tmp_path: Path
) -> None:
    made, stored = both
    wanted = merged(arithmetic(method, [*stored]), WHOLE, tmp_path / "stored")
    assert len(wanted) == 4 * NUMEL
    assert merged(arithmetic(method, made), WHOLE, tmp_path / "whole") == wanted
    if method != "model_stock":  # which merges whole tensors
        assert merged(arithmetic(method, made), CUT, tmp_path / "cut") == wanted


@pytest.mark.parametrize(("method", "limits"), [("linear", WHOLE), ("ties", CUT)])
def test_a_task_takes_the_arena_that_it_is_priced_with_and_not_a_page_less(
    method: str, limits: Limits, both: tuple[list[Source], list[TensorRef]], tmp_path: Path
) -> None:
    made, _ = both
    parts, tasks, facts = cut(arithmetic(method, made), limits)
    upload = opened(parts, tmp_path)

    def runs(priced: int, task: Callable[[Tools], Task]) -> None:
        for arena in (Arena(priced), Arena(priced - PAGE_BYTES)):
            run = task(Tools(STORE, arena, kernels_of("cpu")))
            if arena.nbytes < priced:
                with pytest.raises(ValueError, match="bytes were asked of an arena"):
                    run.read()
                continue
            run.read()
            run.merge()
            run.write()
            run.release()
            assert arena.resize(PAGE_BYTES)  # nobody looks into it any more

    for part in parts:
        runs(price([part], [], 1).arena_bytes, lambda tools, part=part: PartRun(part, upload, facts, tools))
    for task in tasks:
        alone = Survey(task.survey, 1, (task.arithmetics,), NUMEL)
        runs(price([], [alone], 0).arena_bytes, lambda tools, task=task: SurveyRun(task, tools))


def test_a_worker_grows_by_less_than_parts_of_sources_are_priced_at(
    both: tuple[list[Source], list[TensorRef]], tmp_path: Path
) -> None:
    """Of a part that is mostly bytes, and of one whose few bytes are each read by themselves."""
    count, apart = 2000, JOINED_BYTES // 4 + 2
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 4 * count * apart)  # takes no room
    head = STORE.head(from_path(str(path)))
    assert head is not None
    table = TensorRef(head.uri, head.etag, 0, head.size, "F32")
    rows = tuple(RowRun(1, ((0, apart * number),)) for number in range(count))
    models = tuple(
        ModelInput(k, Gathered("gathered", (table,), rows, "F32"), {"weight": 1.0}) for k in (0, 1)
    )
    crowd = Arithmetic("w", "linear", {}, None, models, 7, count, 0, count)
    assert len(set(crowd.refs)) == count
    wholes = crowd.elements(0, 1), crowd, arithmetic("linear", both[0])
    parts = [Part("s", 1, 0, (MergePiece("merge", whole, "F32", None),), 1) for whole in wholes]
    upload = STORE.open_upload(from_path(str(tmp_path / "s")), 4 * NUMEL, {})
    tasks = [
        {
            "part": PART.dump_json(part).decode(),
            "upload": {"uri": upload.uri, "id": upload.id},
            "facts": {},
            "store": StoreSettings().model_dump(mode="json"),
            "device": "cpu",
            "arena_bytes": price([part], [], 1).arena_bytes,
        }
        for part in parts
    ]
    one, *grown = growth(tasks, tmp_path / "tasks")
    priced = [part_peak_bytes(part, 0) for part in parts]
    assert 0 < grown[0] - one <= priced[1] - priced[0]  # the descriptions alone
    assert grown[1] <= priced[2]
