"""The demo's data and training, and the claim that its table rests on, without the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install 'mergemill[demo]'")

from demo import digits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_splits_share_no_image_and_cover_all() -> None:
    task = digits.load_tasks()["mirrored"]
    sizes = [len(split.labels) for split in (task.train, task.validation, task.test)]
    assert sizes == [1078, 359, 360]
    images = torch.cat([split.images for split in (task.train, task.validation, task.test)])
    assert len({image.numpy().tobytes() for image in images}) == sum(sizes) == 1797


@pytest.mark.parametrize(
    ("name", "undo"),
    [
        ("rotated", lambda images: images.rot90(-1, (1, 2))),
        ("mirrored", lambda images: images.flip(2)),
        ("inverted", lambda images: -images),
    ],
)
def test_a_task_is_the_upright_digits_seen_otherwise(
    name: str, undo: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tasks = digits.load_tasks()
    task, upright = tasks[name].test, tasks["upright"].test
    assert not torch.equal(task.images, upright.images)
    assert torch.equal(undo(task.images.view(-1, 8, 8)).flatten(1), upright.images)
    assert torch.equal(task.labels, upright.labels)
    assert [float(task.images.min()), float(task.images.max())] == [-1, 1]


def test_training_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    tasks = digits.load_tasks()
    state = torch.get_rng_state()
    one = digits.train_base(tasks)
    torch.rand(3)
    two = digits.train_base(tasks)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(state, torch.get_rng_state())  # by our rand(3) alone
    torch.set_rng_state(state)
    digits.train_base(tasks)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [digits.SEED, 1, 2])
def test_averaging_beats_the_base_and_every_fine_tune(seed: int) -> None:
    tasks = digits.load_tasks(seed)
    base = digits.train_base(tasks, seed)
    tuned = {name: digits.train_fine_tune(base, tasks[name], seed) for name in digits.TASKS}
    mean = {key: torch.stack([model[key] for model in tuned.values()]).mean(0) for key in base}

    def score(tensors: digits.Tensors) -> float:
        return sum(digits.accuracy(tensors, tasks[name].test) for name in digits.TASKS) / len(digits.TASKS)

    for name, model in tuned.items():
        assert digits.accuracy(model, tasks[name].test) > digits.accuracy(base, tasks[name].test) + 0.05
    rivals = {"base": score(base)} | {name: score(model) for name, model in tuned.items()}
    assert score(mean) > max(rivals.values()) + 0.02, rivals


def test_a_checkpoint_that_lost_a_tensor_is_not_scored() -> None:
    tensors = dict(digits.DigitsMLP().state_dict())
    del tensors["hidden.bias"]
    with pytest.raises(RuntimeError, match=r"hidden\.bias"):
        digits.accuracy(tensors, digits.load_tasks()["upright"].test)
