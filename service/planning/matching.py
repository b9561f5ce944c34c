"""Which tensors of which models make each output tensor, and everything that does not fit. Pure.

All problems are found before anything is said, so that a user mends a recipe once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from service.planning.checkpoint import TIED_NAMES, Checkpoint, StoredTensor
from service.planning.depth import with_depths
from service.planning.misfits import Misfits, listed
from service.planning.pairing import Inputs, Row, pair
from service.planning.statistics import Merged, Statistics, arithmetic_without, strangers
from service.recipe import Recipe, Source
from service.recipe.resolve import Resolved, Resolver, unused_filters
from workers.errors import RecipeError
from workers.methods import get_method
from workers.task import DTYPE_BYTES, Arithmetic, JSONValue, ModelInput, TensorRef

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

_BY_TOKENS = "set `tokenizer_source: union` (or `base`) to merge the rows by their tokens, or "


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
    names: dict[str, None] = {}
    for row in pair(recipe, inputs).rows:
        held = [(own, checkpoint.tensors.get(own)) for own, checkpoint in _sources(row)]
        others = [
            (own, stored) for own, stored in held if stored is not None and stored.ref != row.tensor.ref
        ]
        if others and not _mergeable(row.tensor, [stored for _, stored in held]):
            names |= dict.fromkeys([row.tensor.name, *(own for own, _ in others)])
    return list(names)


def match(recipe: Recipe, inputs: Inputs) -> Match:
    """Find what each tensor of the output is made of."""
    return _Matcher(recipe, inputs).run()


class _Matcher:
    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.recipe = recipe
        self.method = get_method(recipe.merge_method)
        self.resolver = Resolver(recipe)
        self.pairing = pair(recipe, inputs)
        self.spellings: dict[int, set[str]] = {}  # one model may be listed twice, and under two names
        for name, checkpoint in inputs.models.items():
            self.spellings.setdefault(id(checkpoint), set()).add(name)
        self.config = inputs.reference.config
        self.are_digested = inputs.are_digested
        self.are_vocabularies_told = inputs.are_vocabularies_told
        self.misfits = Misfits()
        self.notices = list(inputs.notices)
        self.owners: dict[str, list[Checkpoint]] = {}
        kind = self.method.statistic
        self.statistics = None if kind is None else Statistics(recipe, inputs, kind)
        self.strangers = [] if kind is None else list(strangers(recipe, inputs, kind))
        self.without: list[str] = []

    def run(self) -> Match:
        self._extras()
        self._strangers()
        outputs = [self._tensor(row) for row in self.pairing.rows]
        problems = (*self.pairing.problems, *self.misfits.sentences())
        fitting = tuple(output for output in outputs if output and output.name not in self.misfits.tensors)
        filters = unused_filters(self.recipe, self._names()) if self.pairing.rows else []
        _, depths = with_depths(self.config, self.pairing.slicings)
        if (kind := self.method.statistic) is not None and self.without:
            said = f"without a `{kind.name}`, and merged by `{kind.without}`: {listed(self.without)}"
            self.notices.append(said)
        notices = dict.fromkeys([*self.pairing.notices, *depths, *self.notices, *filters])
        return Match(self._tied(fitting), problems, tuple(notices))

    def _names(self) -> Iterator[str]:
        """Every name that a filter may be in."""
        for row in self.pairing.rows:
            yield row.name
            yield from row.elsewhere or ()

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
            if output.name not in self.owners or of.name not in self.owners:
                return False  # kept as it is, whatever the method
            owners, others = self.owners[output.name], self.owners[of.name]
            return len(owners) == len(others) and all(
                (checkpoint is other and checkpoint.is_tied)
                or source == same  # statistics come last, and tie nothing
                for checkpoint, other, source, same in zip(
                    owners, others, one.sources, two.sources, strict=False
                )
            )

        return tuple(
            replace(output, is_tied=any(repeats(output, of) for of in embeddings))
            if output.name in TIED_NAMES
            else output
            for output in outputs
        )

    def _strangers(self) -> None:
        """Statistics of tensors that there are none of: most likely of another model."""
        for place, model, names in self.strangers:
            if self.recipe.extra_tensors == "drop":
                self.notices += [f"{place}: {name} is not in {model} and left out" for name in names]
            else:
                remedy = "set `extra_tensors: drop` to leave them out"
                for name in names:
                    self.misfits.add(f"tensors that {model} does not have", place, remedy, name)

    def _extras(self) -> None:
        for bound, source, checkpoint, names in self.pairing.extras:
            label = source.model
            for name in names:
                if name in TIED_NAMES and checkpoint.is_tied:
                    self.notices.append(f"{label}: {name} is tied by its config.json and left out")
                elif self.recipe.extra_tensors == "drop":
                    self.notices.append(f"{label}: {name} is not in {bound.against} and left out")
                elif name in TIED_NAMES:
                    self.misfits.add(
                        f"has an output head of its own, which {bound.against} ties to the embedding",
                        label,
                        "set `extra_tensors: drop` to keep the base's tied head",
                        name,
                    )
                else:
                    self.misfits.add(
                        f"tensors that {bound.against} does not have",
                        label,
                        "set `extra_tensors: drop` to leave them out",
                        name,
                    )

    def _tensor(self, row: Row) -> OutputTensor | None:
        found = [
            (place, source, checkpoint, self._find(row, own, source, checkpoint))
            for place, (own, (source, checkpoint)) in enumerate(
                zip(row.names, row.bound.sources, strict=True)
            )
        ]
        present = [
            (place, source, checkpoint, stored)
            for place, source, checkpoint, stored in found
            if stored is not None
        ]
        tensor, inputs = (
            row.tensor,
            [(source, checkpoint, stored) for _, source, checkpoint, stored in present],
        )
        if not _mergeable(tensor, [stored for *_, stored in present]):
            return self._buffer(row, inputs)
        if any(stored.shape != tensor.shape for *_, stored in present):
            return self._mismatch(row, inputs)
        try:
            resolved = self.resolver.resolve(row.bound.stretch, row.name, row.names, row.position)
        except RecipeError as error:
            for problem in error.problems:
                where, _, what = problem.partition(": ")
                self.misfits.add(what, where, "", row.name)
            return None
        return self._merged(row, present, resolved)

    def _merged(
        self,
        row: Row,
        present: Sequence[tuple[int, Source, Checkpoint, StoredTensor]],
        resolved: Resolved,
    ) -> OutputTensor | None:
        tensor = row.tensor
        dtype = self.recipe.out_dtype_name or tensor.dtype
        known = self._known(row, present, resolved.shared)
        if known is None:
            return None
        models = tuple(
            ModelInput(source.index, stored.source, resolved.models[place], statistic)
            for (place, source, _, stored), statistic in zip(present, known, strict=True)
        )
        if self.method.copies and models and models[0].ref.dtype == dtype and resolved.is_default:
            return self._kept(row, present[0][3], dtype)
        has_base = row.bound.stretch.has_task_vectors
        if len(models) < max(1, self.method.min_models):
            return self._kept(row, tensor, dtype)
        if row.name in TIED_NAMES or row.name in EMBEDDING_NAMES:
            owners = [checkpoint for _, _, checkpoint, _ in present]
            self.owners[row.name] = [row.bound.reference, *owners] if has_base else owners
        arithmetic = Arithmetic(
            row.name,
            self.method.name,
            resolved.shared,
            tensor.source if has_base else None,
            models,
            self.recipe.seed,
            tensor.numel,
            0,
            tensor.numel,
            tensor.shape if self.method.whole else (),
        )
        if self.statistics is not None and not arithmetic.statistics:
            arithmetic = arithmetic_without(self.method, arithmetic)
            self.without.append(row.name)
        return OutputTensor(row.name, tensor.shape, dtype, arithmetic, tensor.numel)

    def _known(
        self,
        row: Row,
        present: Sequence[tuple[int, Source, Checkpoint, StoredTensor]],
        parameters: dict[str, JSONValue],
    ) -> Sequence[TensorRef | None] | None:
        """Each model's statistic of a tensor; ``None`` when something is wrong with them."""
        nothing: list[TensorRef | None] = [None] * len(present)
        if self.statistics is None or not present:
            return nothing
        models = []
        for place, source, checkpoint, stored in present:
            own = row.names[place]
            embeddings = EMBEDDING_NAMES if own in TIED_NAMES and checkpoint.may_be_tied else ()
            models.append(Merged(source, (own, stored.name, *embeddings), stored))
        found = self.statistics.of(models, parameters)
        for misfit in found.misfits:
            self.misfits.add(misfit.what, misfit.place, misfit.remedy, row.name, misfit.how)
        return None if found.misfits else found.refs or nothing

    def _find(self, row: Row, own: str, source: Source, checkpoint: Checkpoint) -> StoredTensor | None:
        """The model's own tensor, a stand-in that the recipe allows, or None when it sits out."""
        if (stored := checkpoint.tensors.get(own)) is not None:
            return stored
        tensor, label, against = row.tensor, source.model, row.bound.against
        if own in TIED_NAMES and checkpoint.may_be_tied:
            for name in EMBEDDING_NAMES:
                embedding = checkpoint.tensors.get(name)
                if embedding is not None and embedding.shape == tensor.shape:
                    self.notices.append(f"{label}: {own} is tied to {name}, which stands for it")
                    return embedding
        if self.recipe.missing_tensors == "base":
            self.notices.append(f"{label}: lacks {own}, taken from {against}")
            return tensor if row.bound.stretch.has_task_vectors else None
        self.misfits.add(
            f"lacks tensors of {against}",
            label,
            "set `missing_tensors: base` to take them from the base (or to let the model sit out)",
            own,
        )
        self.misfits.tensors.add(row.name)
        return None

    def _buffer(
        self, row: Row, present: Sequence[tuple[Source, Checkpoint, StoredTensor]]
    ) -> OutputTensor | None:
        """Integers, booleans and dtypes without arithmetic: copied when all agree, never cast."""
        if self.recipe.buffers is not None:
            return self._winner(row, present)
        tensor, reference, against = row.tensor, row.bound.reference, row.bound.against
        own = reference.digests.get(tensor.name)
        for source, checkpoint, stored in present:
            if stored.ref == tensor.ref:
                continue
            if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                self.misfits.add(
                    f"dtype or shape differs from {against} where no arithmetic is possible",
                    source.model,
                    "set `buffers:` to the model whose values win",
                    row.name,
                    f" ({stored.dtype}{list(stored.shape)}, not {tensor.dtype}{list(tensor.shape)})",
                )
            elif self.are_digested and (own is None or checkpoint.digests.get(stored.name) != own):
                kind = "integer or boolean buffers" if tensor.dtype[0] in "IUB" else f"{tensor.dtype} tensors"
                self.misfits.add(
                    f"{kind} differ from {against}",
                    source.model,
                    "they are never averaged: set `buffers:` to the model whose values win",
                    row.name,
                )
        return _copy(row, tensor)

    def _winner(self, row: Row, present: Sequence[tuple[Source, Checkpoint, StoredTensor]]) -> OutputTensor:
        for _, checkpoint, stored in present:
            if self.recipe.buffers in self.spellings[id(checkpoint)]:
                return self._kept(row, stored, stored.dtype)
        return self._kept(row, row.tensor, row.tensor.dtype)

    def _mismatch(
        self, row: Row, present: Sequence[tuple[Source, Checkpoint, StoredTensor]]
    ) -> OutputTensor | None:
        tensor, against = row.tensor, row.bound.against
        if self.recipe.mismatched_tensors == "base":
            self.notices.append(f"{row.name}: shapes differ; {against}'s is kept unmerged")
            dtype = self.recipe.out_dtype_name or tensor.dtype
            return self._kept(row, tensor, dtype)
        for source, _, stored in present:
            if stored.shape == tensor.shape:
                continue
            vocabulary = row.name in (*EMBEDDING_NAMES, *TIED_NAMES)
            if vocabulary and self.are_vocabularies_told and stored.shape[1:] == tensor.shape[1:]:
                self.misfits.tensors.add(row.name)
                continue
            self.misfits.add(
                f"{'vocabulary size' if vocabulary else 'shape'} differs from {against}",
                source.model,
                f"{_BY_TOKENS if vocabulary else ''}set `mismatched_tensors: base` to keep the base's unmerged",
                row.name,
                f" {list(stored.shape)}, not {list(tensor.shape)}",
            )
        return None

    @staticmethod
    def _kept(row: Row, tensor: StoredTensor, dtype: str) -> OutputTensor:
        """One model's tensor alone: copied where it is stored so, else computed."""
        if tensor.dtype == dtype and tensor.source.is_plain:
            return _copy(row, tensor)
        only = ModelInput(0, tensor.source, {})
        arithmetic = Arithmetic(row.name, "passthrough", {}, None, (only,), 0, tensor.numel, 0, tensor.numel)
        return OutputTensor(row.name, tensor.shape, dtype, arithmetic, tensor.numel)


def _sources(row: Row) -> Iterator[tuple[str, Checkpoint]]:
    """Every merged model of a row, and what it calls the tensor."""
    for own, (_, checkpoint) in zip(row.names, row.bound.sources, strict=True):
        yield own, checkpoint


def _mergeable(tensor: StoredTensor, others: Sequence[StoredTensor | None]) -> bool:
    return tensor.is_float and all(other is None or other.is_float for other in others)


def _copy(row: Row, source: StoredTensor) -> OutputTensor:
    return OutputTensor(row.name, source.shape, source.dtype, source, source.numel)
