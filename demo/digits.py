"""A base model and its fine-tunes on scikit-learn's handwritten digits: data, tasks, model, training.

The base has seen a little of everything; each fine-tune has then seen all of one task and begun to forget
the others. Nothing here knows of the service.

Tasks, sizes, seed and the grids of ``demo/__main__.py`` were chosen on other seeds (100 and up), then
fixed; seed 0 was measured after that, once. There is no search over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

SEED = 0
"""Splits, initial weights and the order of the batches all follow from it."""
SPLIT = (0.6, 0.2, 0.2)
"""Fractions of the 1,797 images for training, validation and test; the same images in every task."""
WIDTH = 512
"""Units in each of the two hidden layers."""
BATCH = 64
"""Images a step."""
BASE_FRACTION, BASE_EPOCHS, BASE_RATE = 0.15, 2, 1e-3
"""The base: this share of the training images in all their orientations, passes over it, learning rate."""
TUNE_EPOCHS, TUNE_RATE = 3, 3e-4
"""A fine-tune: passes over all training images of its task, learning rate."""

TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rotated": lambda images: images.rot90(1, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "inverted": lambda images: -images,
}
"""What is done to the images ``[n, 8, 8]``, whose ink goes from -1 to 1, before they are read."""

Tensors = Mapping[str, torch.Tensor]
"""A model's weights by name."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images and what they show."""

    images: torch.Tensor
    """Flat float32 images, ``[n, 64]``."""
    labels: torch.Tensor
    """The digits, int64 ``[n]``."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task's images, in three parts that share no digit."""

    train: Split
    """What models learn from."""
    validation: Split
    """What a merge's density and lambda are chosen on."""
    test: Split
    """What the table reports, and nothing else reads."""


class DigitsMLP(nn.Module):
    """Pixels, two hidden layers, ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(64, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, 10]`` of images ``[n, 64]``."""
        return self.output(torch.relu(self.hidden(torch.relu(self.input(images)))))  # type: ignore[no-any-return]


CONFIG = {
    "architectures": ["DigitsMLP"],
    "model_type": "digits_mlp",
    "hidden_size": WIDTH,
    "torch_dtype": "float32",
}
"""The ``config.json`` of every checkpoint here."""


def load_tasks(seed: int = SEED) -> dict[str, Task]:
    """Every task by name, and ``upright``, which only the base learns from."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = int(SPLIT[0] * len(order)), int((SPLIT[0] + SPLIT[1]) * len(order))
    parts = order[:first], order[first:second], order[second:]

    def task(turn: Callable[[torch.Tensor], torch.Tensor]) -> Task:
        return Task(*(Split(turn(images[part]).flatten(1), labels[part]) for part in parts))

    return {name: task(turn) for name, turn in {"upright": lambda same: same, **TASKS}.items()}


def train_base(tasks: Mapping[str, Task], seed: int = SEED) -> dict[str, torch.Tensor]:
    """The base: a few steps on a small share of everybody's training images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat([task.train.images for task in tasks.values()])
    labels = torch.cat([task.train.labels for task in tasks.values()])
    seen = torch.randperm(len(labels), generator=generator)[: int(BASE_FRACTION * len(labels))]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsMLP()
    return _train(model, Split(images[seen], labels[seen]), BASE_EPOCHS, BASE_RATE, generator)


def train_fine_tune(base: Tensors, task: Task, seed: int = SEED) -> dict[str, torch.Tensor]:
    """The base, trained further on one task."""
    generator = torch.Generator().manual_seed(seed)
    return _train(_model(base), task.train, TUNE_EPOCHS, TUNE_RATE, generator)


@torch.inference_mode()
def accuracy(tensors: Tensors, split: Split) -> float:
    """The share of images that the model with these weights reads right."""
    return float((_model(tensors)(split.images).argmax(1) == split.labels).float().mean())


def _model(tensors: Tensors) -> DigitsMLP:
    model = DigitsMLP()
    model.load_state_dict(dict(tensors))  # strict: a merge that lost or renamed a tensor fails here
    return model


def _train(
    model: DigitsMLP, data: Split, epochs: int, rate: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.labels), generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            cross_entropy(model(data.images[batch]), data.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
