"""Random recipes over models of different vocabularies: whose tokens, which rows stand for them, and padding.

Each is a function of its number. Rows are compared by their tokens: the order of a union is nobody's promise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import add
from pathlib import Path
from typing import Any

import tokenizers
import torch

from service.recipe_names import with_names
from service.vocabulary.templates import NAMED
from tests.checkpoints import llama_config, llama_tensors, read_checkpoint, write_checkpoint
from tests.oracle.compare import Distance
from tests.tokenizers import bpe, files, unigram, wordpiece

SHAPE: dict[str, Any] = {"layers": 1, "hidden": 16, "heads": 2}
TEXTS = (
    "abc",
    "ab c<y>",
    "a<x>b<sys>c",
    "hello worlds",
    "<s>a bc</s>",
    "d e <m> foo",
    "bca cab",
    "<new>a<new>",
)
"""What both tools' tokenizers have to encode alike."""

TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "{{ messages | length }}",
)
"""The chat templates of the first and last model, and of the second."""

TALKS = (
    [{"role": "user", "content": "a b"}],
    [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "c"},
    ],
)
"""What both tools' chat templates have to render alike."""

LOOSE = ("alpaca", "exaone", "llama3")
"""Templates of mergekit's that put white space where the formats that they are called after have none, or lack it."""

BOUND = 1e-6
"""Largest error, in units of the sum of the weights times the largest value of a row."""

_LETTERS = ("a", "b", "c", "d", "e", "f", "g", "h")
_MADE: Mapping[str, tuple[tokenizers.Tokenizer, ...]] = {
    "bpe": (
        bpe([*_LETTERS, "ab"], [("a", "b")], added=["<x>"]),
        bpe([*reversed(_LETTERS), "i", "bc"], [("b", "c")], special=["<sys>"], added=["<y>"]),
        bpe([*_LETTERS, "j", "ab", "abc"], [("a", "b"), ("ab", "c")], added=["<y>", "<m>"]),
    ),
    "wordpiece": (
        wordpiece(["hello", "world", "##s", *_LETTERS]),
        wordpiece([*_LETTERS, "world", "foo", "##s", "##b"], special=["<sys>"], added=["<m>"]),
        wordpiece(["foo", "hello", *_LETTERS, "##c"], added=["<x>"]),
    ),
    "unigram": (
        unigram(["▁a", *_LETTERS, "▁"]),
        unigram(["▁", *_LETTERS, "▁b", "bc"], added=["<m>"]),
        unigram([*reversed(_LETTERS), "▁", "▁c"], special=["<sys>"]),
    ),
}
KINDS = (*_MADE, "mixed")
FEATURES = (
    "union", "base", "a model's", "no base model", "tied", "padded inputs", "a token's model", "a token's zeros",
    "another token's row", "force", "a new token", "pad_to_multiple_of", "chat_template", *KINDS,
)  # fmt: skip
"""What the report counts."""


@dataclass(frozen=True, eq=False)
class Worded:
    """One random recipe."""

    name: str
    """What it is called on disk."""
    recipe: dict[str, Any]
    """The recipe; models are called ``group/model``."""
    features: frozenset[str]
    """Which of :data:`FEATURES` it has."""
    order_decides: bool
    """Whether mergekit's base of a union changes from run to run, and with it how texts are split."""

    def placed(self, root: Path, **more: Any) -> dict[str, Any]:
        """The recipe with its models below ``root``."""
        return with_names(self.recipe, lambda _, name: str(root / name)) | more


@dataclass(frozen=True, slots=True)
class ComparedWords:
    """One recipe's outcome."""

    worded: Worded
    """The recipe."""
    distance: Distance = field(default_factory=Distance)
    """All rows of tokens, and all other tensors."""
    problems: tuple[str, ...] = ()
    """What else is not as it has to be."""


def write_vocabulary_inputs(root: Path) -> None:
    """Write three models of each kind, tied and untied, the second one with rows beyond its tokens."""
    for kind in KINDS:
        for tied in (False, True):
            for number, tokenizer in enumerate(_tokenizers(kind)):
                rows = tokenizer.get_vocab_size(with_added_tokens=True) + (9 if number == 1 else 0)
                seed = KINDS.index(kind) * 10 + number
                write_checkpoint(
                    root / _group(kind, tied) / "abc"[number],
                    llama_tensors(seed, vocab=rows, tied=tied, **SHAPE),
                    llama_config(vocab=rows, tied=tied, **SHAPE),
                    extra_files=files(tokenizer, template=TEMPLATES[number % 2]),
                )


def worded(number: int) -> Worded:
    """The recipe of this number."""
    rng = random.Random(number)
    kind, tied = KINDS[number % len(KINDS)], rng.random() < 0.4
    group = _group(kind, tied)
    names = rng.sample("abc", rng.choice((2, 3, 3)))
    source = ("union", "base", "model", "union")[number // len(KINDS) % 4]
    has_base = source == "base" or rng.random() < 0.6
    method = rng.choice(("linear", "task_arithmetic")) if has_base else "linear"
    models = [
        {"model": f"{group}/{name}", "parameters": {"weight": round(rng.uniform(0.2, 1), 2)}}
        for name in names
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    features = {kind, {"model": "a model's"}.get(source, source)}
    if has_base:
        recipe["base_model"] = f"{group}/{names[0]}"
    else:
        features.add("no base model")
    if tied:
        features.add("tied")
    if "b" in names:
        features.add("padded inputs")
    whose = f"{group}/{rng.choice(names)}" if source == "model" else source
    tokens, said = _tokens(rng, kind, group, names, source) if rng.random() < 0.7 else ({}, set())
    padding = rng.choice((8, 16)) if rng.random() < 0.5 else None
    features |= said | ({"pad_to_multiple_of"} if padding else set())
    if number % 3 == 0:
        recipe["chat_template"] = rng.choice(
            (*NAMED, TEMPLATES[0].replace("[", "<"), *(["auto"] if len(names) == 3 else []))
        )
        features.add("chat_template")
    if tokens or padding:
        more = ({"tokens": tokens} if tokens else {}) | ({"pad_to_multiple_of": padding} if padding else {})
        recipe["tokenizer"] = {"source": whose} | more
    else:
        recipe["tokenizer_source"] = whose
    return Worded(f"words-{number:02d}", recipe, frozenset(features), source == "union" and not has_base)


def _tokens(
    rng: random.Random, kind: str, group: str, names: Sequence[str], source: str
) -> tuple[dict[str, Any], set[str]]:
    """What a recipe says of single tokens, and the features that are in it."""
    vocabularies = dict(zip("abc", (each.get_vocab() for each in _tokenizers(kind)), strict=True))
    common = sorted(set.intersection(*(set(vocabularies[name]) for name in names)))
    found: dict[str, Any] = {}
    said = set()
    for token in rng.sample(common, 2):
        of = rng.choice(names)
        choice = rng.choice(("model", "zero", "token", "id"))
        if choice == "model":
            found[token] = {"source": f"{group}/{of}"}
            said.add("a token's model")
        elif choice == "zero":
            found[token] = {"source": {"kind": "zero"}}
            said.add("a token's zeros")
        else:
            other = rng.choice(sorted(vocabularies[of]))
            which = {"token": other} if choice == "token" else {"token_id": vocabularies[of][other]}
            found[token] = {"source": {"kind": "model_token", "model": f"{group}/{of}", **which}}
            said.add("another token's row")
        if rng.random() < 0.8:  # these are in every model, so that nothing comes of it otherwise
            found[token]["force"] = True
            said.add("force")
    if source == "union" and rng.random() < 0.6:
        found["<new>"] = {"source": {"kind": "zero"}}
        said.add("a new token")
    return found, said


def compare_words(
    worded: Worded,
    root: Path,
    ours: Path,
    theirs: Path,
    encoded: Mapping[str, Any],
    rendered: Mapping[str, Any],
) -> ComparedWords:
    """Compare both results: rows by their tokens, other tensors whole, texts by their tokens, sizes and numbers.

    :param encoded: what transformers makes of :data:`TEXTS` with our files: numbers by text.
    :param rendered: what it makes of :data:`TALKS`, by directory.
    """
    one, two = (tokenizers.Tokenizer.from_file(str(place / "tokenizer.json")) for place in (ours, theirs))
    numbers, their_numbers = one.get_vocab(), two.get_vocab()
    problems = []
    problems += _talks(worded, *(rendered.get(str(place), []) for place in (ours, theirs)))
    if numbers.keys() != their_numbers.keys():
        odd = sorted(numbers.keys() ^ their_numbers.keys())
        return ComparedWords(worded, problems=(f"only one has the tokens {odd[:4]}",))
    mine, others = read_checkpoint(ours), read_checkpoint(theirs)
    if mine.keys() != others.keys():
        return ComparedWords(worded, problems=(f"only one has {sorted(mine.keys() ^ others.keys())}",))
    order = sorted(numbers)
    rows = torch.tensor([numbers[token] for token in order])
    their_rows = torch.tensor([their_numbers[token] for token in order])
    found = Distance()
    weights = sum(entry["parameters"]["weight"] for entry in worded.recipe["models"])
    for name, tensor in mine.items():
        other = others[name]
        if tensor.shape != other.shape:
            problems.append(f"{name} is {list(tensor.shape)}, mergekit's {list(other.shape)}")
            continue
        is_of_tokens = name in ("model.embed_tokens.weight", "lm_head.weight")
        pair = (tensor[rows], other[their_rows]) if is_of_tokens else (tensor, other)
        found += _distance(*pair, weights)
    problems += _texts(worded, one, two, encoded)
    problems += _numbers(worded, root, ours, theirs, numbers)
    return ComparedWords(worded, found, tuple(problems))


def _distance(ours: torch.Tensor, theirs: torch.Tensor, weights: float) -> Distance:
    error = (ours.double() - theirs.double()).abs()
    bound = BOUND * max(1.0, weights) * max(1e-2, float(theirs.abs().max()))
    return Distance(
        ours.numel(), int((ours != theirs).sum()), int((error > bound).sum()), float(error.max()) / bound, 0
    )


def _talks(worded: Worded, ours: Sequence[str], theirs: Sequence[str]) -> Iterator[str]:
    loose = worded.recipe.get("chat_template") in LOOSE
    for one, two in zip(ours, theirs, strict=True):
        if ("".join(one.split()) != "".join(two.split())) if loose else one != two:
            yield f"a talk is {one!r}, mergekit's {two!r}"


def _texts(
    worded: Worded, one: tokenizers.Tokenizer, two: tokenizers.Tokenizer, encoded: Mapping[str, Any]
) -> Iterator[str]:
    for text in TEXTS:
        own = one.encode(text)
        if not worded.order_decides and own.tokens != two.encode(text).tokens:
            yield f"{text!r} is {own.tokens}, mergekit's {two.encode(text).tokens}"
        if encoded[text] != own.ids:
            yield f"{text!r} is {own.ids}, with transformers {encoded[text]}"


def _numbers(
    worded: Worded, root: Path, ours: Path, theirs: Path, numbers: Mapping[str, int]
) -> Iterator[str]:
    """What is wrong with config.json: its size has to be mergekit's, and its numbers those of the same tokens."""
    config, other = (json.loads((place / "config.json").read_text()) for place in (ours, theirs))
    if config["vocab_size"] != other["vocab_size"]:
        yield f"config.json says {config['vocab_size']} tokens, mergekit's {other['vocab_size']}"
    reference = worded.recipe.get("base_model", worded.recipe["models"][0]["model"])
    before = json.loads((root / reference / "config.json").read_text())
    tokens = tokenizers.Tokenizer.from_file(str(root / reference / "tokenizer.json"))
    for role in ("bos", "eos"):
        token = tokens.id_to_token(before[f"{role}_token_id"])
        if config[f"{role}_token_id"] != numbers.get(token):
            yield f"{role}_token_id is {config[f'{role}_token_id']}, and {token} is {numbers.get(token)}"


def words_problems(results: Iterable[ComparedWords]) -> Iterator[str]:
    """One sentence for everything that is not as it has to be."""
    for result in results:
        name, found = result.worded.name, result.distance
        yield from (f"{name}: {problem}" for problem in result.problems)
        if not result.problems and (found.over or not found.elements):
            yield f"{name}: {found.over} of {found.elements} beyond the bound"


def words_table(results: Iterable[ComparedWords]) -> str:
    """How many recipes have each feature, and how far the worst of them is off."""
    found = list(results)
    lines = []
    for name in FEATURES:
        own = [each for each in found if name in each.worded.features]
        together = reduce(add, (each.distance for each in own), Distance())
        same = 1 - together.differing / max(1, together.elements)
        lines.append(
            f"| {name} | {len(own)} | {together.elements:,} | {same:.2%} | {together.over} | {together.worst:.2f} |"
        )
    return "\n".join(lines)


def _group(kind: str, tied: bool) -> str:
    return f"vocabulary-{kind}{'-tied' if tied else ''}"


@cache
def _tokenizers(kind: str) -> tuple[tokenizers.Tokenizer, ...]:
    if kind == "mixed":
        return tuple(_MADE[each][number] for number, each in enumerate(_MADE))
    return _MADE[kind]
