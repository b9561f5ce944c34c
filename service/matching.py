"""Which tensors of which models make each output tensor, and everything that does not fit. Pure.

All problems are found before anything is said, so that a user mends a recipe once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.checkpoint import TIED_NAMES, Checkpoint, StoredTensor
from service.recipe import Recipe
from workers.methods import get_method
from workers.methods.resolve import resolve_parameters
from workers.task import DTYPE_BYTES, Arithmetic, ModelInput

EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "shared.weight",
    "model.decoder.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
)
"""Input embeddings that a tied head stands for."""

_SHOWN = 8
"""How many tensor names a problem lists before it counts the rest."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """What one output tensor is made of."""

    name: str
    """Its key."""
    shape: tuple[int, ...]
    """Sizes of its dimensions."""
    dtype: str
    """Safetensors dtype in the output."""
    source: StoredTensor | Arithmetic
    """A stored tensor to copy byte for byte, or the arithmetic over the whole tensor."""
    numel: int
    """Number of elements."""
    is_tied: bool = False
    """Whether its elements are another output tensor's once more, stored for each name that is tied to it."""

    @property
    def is_counted(self) -> bool:
        """Whether it has elements of its own, which a statistic of the whole model counts."""
        return self.numel > 0 and not self.is_tied

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoints of a recipe."""

    reference: Checkpoint
    """The base, else the first model: decides names, shapes, config and tokenizer."""
    models: tuple[Checkpoint, ...]
    """One per :attr:`Recipe.task_models`, in that order."""
    compared_with: str | None = None
    """The model that stands in for a reference that did not open, by its name in the recipe."""
    are_digested: bool = True
    """Whether the tensors that no arithmetic is done on could be read to compare them."""


@dataclass(frozen=True)
class Match:
    """The outcome: the output, as far as there are no problems."""

    tensors: tuple[OutputTensor, ...]
    """Those that nothing is wrong with, in the reference's order."""
    problems: tuple[str, ...]
    """Everything that makes the merge impossible, one sentence each."""
    notices: tuple[str, ...]
    """What the user should know but need not act on."""


def needs_digest(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Names of the tensors that no arithmetic is done on and that must be compared byte for byte."""
    if recipe.buffers is not None:
        return []
    others = [model for model in inputs.models if model is not inputs.reference]
    return [
        name
        for name, tensor in inputs.reference.tensors.items()
        if not _mergeable(tensor, [model.tensors.get(name) for model in others])
        and any(name in model.tensors for model in others)
    ]


def match(recipe: Recipe, inputs: Inputs) -> Match:
    """Pair every tensor of the reference with those of the models."""
    return _Matcher(recipe, inputs).run()


class _Matcher:
    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.recipe = recipe
        self.reference = inputs.reference
        self.method = get_method(recipe.merge_method)
        entries = recipe.task_models
        parameters, per_model = resolve_parameters(
            self.method, recipe.profile, recipe.parameters, [entry.parameters for _, entry in entries]
        )
        self.parameters = parameters.model_dump(mode="json", by_alias=True)
        self.models = [
            (index, checkpoint, own.model_dump(mode="json", by_alias=True))
            for (index, _), checkpoint, own in zip(entries, inputs.models, per_model, strict=True)
        ]
        self.labels: dict[int, str] = {}
        self.spellings: dict[int, set[str]] = {}  # one model may be listed twice, and under two names
        for (_, entry), checkpoint in zip(entries, inputs.models, strict=True):
            self.labels.setdefault(id(checkpoint), entry.model)
            self.spellings.setdefault(id(checkpoint), set()).add(entry.model)
        self.against = inputs.compared_with or recipe.reference
        self.are_digested = inputs.are_digested
        self.found: dict[tuple[str, str, str], list[str]] = {}
        self.misfits: set[str] = set()
        self.notices: list[str] = []

    def run(self) -> Match:
        self._extras()
        outputs = [self._tensor(tensor) for tensor in self.reference.tensors.values()]
        problems = tuple(self._sentences())
        fitting = tuple(output for output in outputs if output and output.name not in self.misfits)
        return Match(self._tied(fitting), problems, tuple(self.notices))

    def _tied(self, outputs: tuple[OutputTensor, ...]) -> tuple[OutputTensor, ...]:
        """The outputs, with those marked that are an embedding's elements once more, in the base and every model:
        because ``tie_word_embeddings`` says so (what is stored for the tied name is then not read), or because the
        same bytes stand for both."""
        embeddings = [output for output in outputs if output.name in EMBEDDING_NAMES]

        def repeats(output: OutputTensor, of: OutputTensor) -> bool:
            one, two = output.source, of.source
            if not isinstance(one, Arithmetic) or not isinstance(two, Arithmetic):
                return False
            if of is output or (one.method, output.shape) != (two.method, of.shape):
                return False
            owners = ([self.reference] if one.base else []) + [checkpoint for _, checkpoint, _ in self.models]
            return all(
                checkpoint.is_tied or ref == other
                for checkpoint, ref, other in zip(owners, one.refs, two.refs, strict=True)
            )

        return tuple(
            replace(output, is_tied=any(repeats(output, of) for of in embeddings))
            if output.name in TIED_NAMES
            else output
            for output in outputs
        )

    def _problem(self, what: str, model: str, remedy: str, tensor: str, how: str = "") -> None:
        self.found.setdefault((what, model, remedy), []).append(tensor + how)
        self.misfits.add(tensor)

    def _sentences(self) -> list[str]:
        sentences = []
        for (what, model, remedy), names in self.found.items():
            shown = ", ".join(names[:_SHOWN]) + (
                f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            )
            sentences.append(f"{model}: {what}: {shown}{'; ' + remedy if remedy else ''}")
        return sentences

    def _extras(self) -> None:
        for _, checkpoint, _ in self.models:
            label = self.labels[id(checkpoint)]
            for name in checkpoint.tensors:
                if name in self.reference.tensors:
                    continue
                if name in TIED_NAMES and checkpoint.is_tied:
                    self.notices.append(f"{label}: {name} is tied by its config.json and left out")
                elif self.recipe.extra_tensors == "drop":
                    self.notices.append(f"{label}: {name} is not in {self.against} and left out")
                elif name in TIED_NAMES:
                    self._problem(
                        f"has an output head of its own, which {self.against} ties to the embedding",
                        label,
                        "set `extra_tensors: drop` to keep the base's tied head",
                        name,
                    )
                else:
                    self._problem(
                        f"tensors that {self.against} does not have",
                        label,
                        "set `extra_tensors: drop` to leave them out",
                        name,
                    )

    def _tensor(self, tensor: StoredTensor) -> OutputTensor | None:
        inputs = [
            (index, checkpoint, own, self._find(tensor, checkpoint)) for index, checkpoint, own in self.models
        ]
        present = [
            (index, checkpoint, own, stored)
            for index, checkpoint, own, stored in inputs
            if stored is not None
        ]
        if not _mergeable(tensor, [stored for *_, stored in present]):
            return self._buffer(tensor, [(checkpoint, stored) for _, checkpoint, _, stored in present])
        if any(stored.shape != tensor.shape for *_, stored in present):
            return self._mismatch(tensor, [(checkpoint, stored) for _, checkpoint, _, stored in present])
        dtype = self.recipe.out_dtype_name or tensor.dtype
        models = tuple(ModelInput(index, stored.ref, own) for index, _, own, stored in present)
        if self.method.copies and models and models[0].ref.dtype == dtype and _is_unscaled(models[0]):
            return _copy(tensor, present[0][3])
        if not self.recipe.has_task_vectors and len(models) < max(1, self.method.min_models):
            return _copy(tensor, tensor) if tensor.dtype == dtype else self._cast(tensor, dtype)
        base = tensor.ref if self.recipe.has_task_vectors else None
        arithmetic = Arithmetic(
            tensor.name,
            self.method.name,
            self.parameters,
            base,
            models,
            self.recipe.seed,
            tensor.numel,
            0,
            tensor.numel,
            tensor.shape if self.method.whole else (),
        )
        return OutputTensor(tensor.name, tensor.shape, dtype, arithmetic, tensor.numel)

    def _find(self, tensor: StoredTensor, checkpoint: Checkpoint) -> StoredTensor | None:
        """The model's tensor of this name, a stand-in that the recipe allows, or None when it sits out."""
        if (stored := checkpoint.tensors.get(tensor.name)) is not None:
            return stored
        label = self.labels[id(checkpoint)]
        if tensor.name in TIED_NAMES and checkpoint.may_be_tied:
            for name in EMBEDDING_NAMES:
                embedding = checkpoint.tensors.get(name)
                if embedding is not None and embedding.shape == tensor.shape:
                    self.notices.append(f"{label}: {tensor.name} is tied to {name}, which stands for it")
                    return embedding
        if self.recipe.missing_tensors == "base":
            self.notices.append(f"{label}: lacks {tensor.name}, taken from {self.against}")
            return tensor if self.recipe.has_task_vectors else None
        self._problem(
            f"lacks tensors of {self.against}",
            label,
            "set `missing_tensors: base` to take them from the base (or to let the model sit out)",
            tensor.name,
        )
        return None

    def _buffer(
        self, tensor: StoredTensor, present: Sequence[tuple[Checkpoint, StoredTensor]]
    ) -> OutputTensor | None:
        """Integers, booleans and dtypes without arithmetic: copied when all agree, never cast."""
        if self.recipe.buffers is not None:
            return self._winner(tensor, present)
        own = self.reference.digests.get(tensor.name)
        for checkpoint, stored in present:
            label = self.labels[id(checkpoint)]
            if checkpoint is self.reference or stored.ref == tensor.ref:
                continue
            if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                self._problem(
                    f"dtype or shape differs from {self.against} where no arithmetic is possible",
                    label,
                    "set `buffers:` to the model whose values win",
                    tensor.name,
                    f" ({stored.dtype}{list(stored.shape)}, not {tensor.dtype}{list(tensor.shape)})",
                )
            elif self.are_digested and (own is None or checkpoint.digests.get(tensor.name) != own):
                kind = "integer or boolean buffers" if tensor.dtype[0] in "IUB" else f"{tensor.dtype} tensors"
                self._problem(
                    f"{kind} differ from {self.against}",
                    label,
                    "they are never averaged: set `buffers:` to the model whose values win",
                    tensor.name,
                )
        return _copy(tensor, tensor)

    def _winner(
        self, tensor: StoredTensor, present: Sequence[tuple[Checkpoint, StoredTensor]]
    ) -> OutputTensor:
        for checkpoint, stored in present:
            if self.recipe.buffers in self.spellings[id(checkpoint)]:
                return _copy(stored, stored)
        return _copy(tensor, tensor)

    def _mismatch(
        self, tensor: StoredTensor, present: Sequence[tuple[Checkpoint, StoredTensor]]
    ) -> OutputTensor | None:
        if self.recipe.mismatched_tensors == "base":
            self.notices.append(f"{tensor.name}: shapes differ; {self.against}'s is kept unmerged")
            dtype = self.recipe.out_dtype_name or tensor.dtype
            return _copy(tensor, tensor) if tensor.dtype == dtype else self._cast(tensor, dtype)
        for checkpoint, stored in present:
            if stored.shape == tensor.shape:
                continue
            vocabulary = tensor.name in (*EMBEDDING_NAMES, *TIED_NAMES)
            self._problem(
                f"{'vocabulary size' if vocabulary else 'shape'} differs from {self.against}",
                self.labels[id(checkpoint)],
                "set `mismatched_tensors: base` to keep the base's unmerged",
                tensor.name,
                f" {list(stored.shape)}, not {list(tensor.shape)}",
            )
        return None

    def _cast(self, tensor: StoredTensor, dtype: str) -> OutputTensor:
        only = ModelInput(0, tensor.ref, {})
        arithmetic = Arithmetic(
            tensor.name, "passthrough", {}, None, (only,), 0, tensor.numel, 0, tensor.numel
        )
        return OutputTensor(tensor.name, tensor.shape, dtype, arithmetic, tensor.numel)


def _mergeable(tensor: StoredTensor, others: Sequence[StoredTensor | None]) -> bool:
    return tensor.is_float and all(other is None or other.is_float for other in others)


def _is_unscaled(model: ModelInput) -> bool:
    return bool(model.parameters.get("scale", 1.0) == 1.0)


def _copy(shape_of: StoredTensor, source: StoredTensor) -> OutputTensor:
    return OutputTensor(shape_of.name, source.shape, source.dtype, source, source.numel)
