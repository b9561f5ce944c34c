"""What came out, as ``docs/parity.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from service.planning.plan import SEMANTICS_VERSION
from tests.oracle.adapters import Merged, adapter_table
from tests.oracle.architectures import Opened, architecture_table
from tests.oracle.cases import Case
from tests.oracle.compare import Distance, Mask
from tests.oracle.exact import Nearness
from tests.oracle.methods import COUNT, EXCEPTIONS, METHOD_CASES, RECIPES, is_excepted
from tests.oracle.several import SeveralCompared, several_table
from tests.oracle.spoken import Compared, spoken_table
from tests.oracle.vocabularies import ComparedWords, words_table

LEAST_OF_A_METHOD = 10
"""In so many recipes each method has to be."""
LEAST_OF_A_FEATURE = 20
"""And in so many each feature of the language."""

SIGMAS = 5
"""A mask's share may be this many standard deviations from its density."""

WORDS = """\
# Parity with other tools

Written by `make oracle`; don't edit it by hand. Mergemill's semantics version {semantics} beside
{versions}:
all on CPU, on Llama-shaped checkpoints of two layers with random weights: a base, three fine-tunes of
σ = 0.001, 0.002 and 0.003 (one of them leaves a layer as it was) and an unrelated model; some in one file,
some in shards.

{outcome}

## Other architectures

Models that transformers builds from its config classes, with three layers, and one real checkpoint; of each two
fine-tunes with other random weights. Merged are their mean (`linear`) and, of layers 0 and 1 of one and 1 and 2
of the other, a model of four layers (`passthrough` of `slices`). *Same* means that transformers opens what
Mergemill wrote with no missing, unexpected or mismatched key, and that every parameter, every field of
config.json and the logits, all finite, are bit for bit those that transformers itself gives when it averages or
moves the parameters of the models as it opens them.

| class | | parameters | mean | slices |
|---|---|---:|---|---|
{architectures}

## The same recipe, the same numbers

Both run the same YAML with `dtype: float32`; ours adds `profile: mergekit`. Every element has to be within
10⁻⁶ · (\\|θ_base\\| + Σ\\|wτ\\|) for methods on task vectors, 10⁻⁶ · Σ\\|wθ\\| for averages and
10⁻⁶ · (\\|θ₁\\| + \\|θ₂\\|) for SLERP: about sixteen float32 roundings of what is summed. *Worst* is the
largest error in units of that bound. *Undefined* elements are left out: their magnitude in some task vector
equals the trim's threshold, as others' do, and which of the equals make up exactly k is nobody's promise. Both write
shards of 100 kB, and what is beside them has to agree, too: every field of config.json that both have (but for the
dtype, which ours has as it was written), and the tensors and the total size in the index.

| recipe | elements | undefined | same bits | beyond the bound | worst |
|---|---:|---:|---:|---:|---:|
{parity}

## The other methods

{count} random recipes for each, of one to three of the models and with random parameters; *excepted* recipes, and what
is apart in them, are left out of the other figures. For some of these methods the bound is
[wider](#where-the-bound-is-wider).

| method | recipes | elements | undefined | same bits | beyond the bound | worst | excepted recipes | apart in them |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{methods}

{exceptions}

## The language

{languages} random recipes of the same numbers: whole models, slices and modules, gradients and filters,
parameters at every level, base models of slices, layers that are repeated or not the same ones, on Llama-,
Mistral- and GPT-2-shaped checkpoints of six layers. Each is planned and run by the code that serves jobs, in
one process. With `out_dtype: bfloat16` a result may also be one step of bfloat16 off, where the two float32
results lie on either side of the middle: fewer than one in a thousand of float32 inputs, while the mean of two
bfloat16 inputs often lies in the very middle.

| | | recipes | elements | same bits | beyond the bound | worst |
|---|---|---:|---:|---:|---:|---:|
{spoken}

## Several documents

{chains} random recipes of two or three documents, in any order, of which later ones use earlier ones,
beside `mergekit-multi`: earlier merges that are computed on the way, staged or copied. The bound is 4 · 10⁻⁶ of the
largest magnitude in tensors of a shape, since layers move. Where an earlier merge is rounded to bfloat16, one in a
thousand may be beyond it: its float32 result lay on the other side of the middle of two steps.

| | recipes | elements | same bits | beyond the bound | worst |
|---|---:|---:|---:|---:|---:|
{several}

## Vocabularies

{worded} random recipes over models of different vocabularies: byte-level BPE, WordPiece and Unigram tokenizers, and all
three together (*mixed*), tied and untied, one model padded beyond its tokens. Rows of embeddings and heads are compared
by their tokens, within 10⁻⁶ · Σ\\|w\\| · max \\|θ\\|; both tokenizers have to have the same tokens and to encode
the same texts alike, and transformers has to read ours to the same numbers; chat templates have to render alike.

| | recipes | elements | same bits | beyond the bound | worst |
|---|---:|---:|---:|---:|---:|
{words}

Where Mergemill does otherwise than mergekit, on purpose:

- **Order.** mergekit numbers the tokens that a union adds in an order that changes from run to run, and without a base
  model even takes another model's tokenizer for the base. Here it is the recipe's order, and the first model's.
- **Padding.** mergekit's rows of `pad_to_multiple_of` are the mean of all rows of each model's; here they are zeros:
  they stand for no token, and a mean over all rows would have every task read the whole tensor.
- **Numbers of special tokens.** mergekit leaves `bos_token_id` and its like as they were, so with another model's
  tokenizer they may be those of other tokens. Here config.json and generation_config.json (which mergekit leaves out)
  keep the tokens and change the numbers.
- **Rows that no operand has.** Where a tensor is one model's alone, as in `passthrough` slices, mergekit fills what
  that model lacks with zeros; here with the rows of the recipe's other models.
- **New tokens** under `tokens` with `source: base` or a model's end mergekit with a KeyError; here they are appended.
- **Nothing differs.** When all tokenizers and row counts are the same and nothing else is asked for, rows beyond the
  tokens stay; mergekit cuts them off.
- **Chat templates.** What transformers renders of conversations has to be the same, but for white space with three of
  the named ones: mergekit's `llama3` puts a line feed between messages, its `exaone` indents them, and its `alpaca`
  has none before the answer; here they have what the formats that they are called after have.
- **Gaps.** A base with gaps between its tokens' numbers ends mergekit with an IndexError; here the base's rows stay.
- **Tied heads.** A model with a head of its own on a tied base gives mergekit an output with both, whose config says
  tied; here it is an error that names `extra_tensors: drop`.

## Where the bound is wider

It is ten times as wide for `multislerp`, twice for `karcher` and four times for `sce`; and for `task_arithmetic` with
`normalize`, in what comes of the task vectors, by Σ\\|w\\| over \\|Σw\\|, which is much where weights nearly cancel. To
tell whose rounding that makes room for, these recipes (of `task_arithmetic` the tensors whose weights have both signs,
written as float32) are computed once more in float64, from the definitions. *Beyond* and *worst* are each tool's
distance from that, in units of the bound as it is before it is widened. Elements on which a rounding decides are left
out.

| method | elements | Mergemill beyond | worst | mergekit beyond | worst | the room is for the rounding of |
|---|---:|---:|---:|---:|---:|---|
{exact}

## Stored as bfloat16

Every recipe of the first table, and every third of the other methods, once more with `out_dtype: bfloat16`. *Rounded
otherwise* are elements that are not the tool's own float32 result rounded once to the nearest, ties to even: there is
none. So wherever the float32 results are the same the bfloat16 ones are, and each that *differs* is one whose float32
results, within the bound above of each other, lie on two sides of the middle of two steps of bfloat16.

| method | recipes | elements | undefined | differ | rounded otherwise |
|---|---:|---:|---:|---:|---:|
{stored}

## With `dtype: bfloat16`

For information. mergekit then rounds every intermediate to bfloat16; Mergemill computes in float32 and
rounds once. *Different* is the share of elements whose bfloat16 results are not the same.

| recipe | elements | undefined | different |
|---|---:|---:|---:|
{rounded}

## LoRA adapters

PEFT makes random adapters on small Llama- and GPT-2-shaped models, in float32 and bfloat16, and merges each
into its model by `merge_and_unload`; Mergemill does by `passthrough` over `model+adapter`. Then mergekit runs
recipes over such models in float32; and PEFT merges adapters that Mergemill made, which has to give what
Mergemill merges itself. An element may be 10⁻⁶ of its tensor's largest apart, in bfloat16 one
step, and fewer than one in a thousand may differ there. Of embeddings in bfloat16 more do: there PEFT rounds
the product of the factors before it adds it, which it does for no other layer; Mergemill never does.

| adapter or recipe | tool | elements | same bits | beyond the bound | worst |
|---|---|---:|---:|---:|---:|
{adapters}

## DARE: the mask

The generators differ by design, so the masks are compared in what they promise: the share that is kept, on
the elements that are big enough to tell, within {sigmas} standard deviations; and the kept ones equal to
θ_base + factor · τ. The factor is 1/density (`inverse`), or under `profile: mergekit`, as in mergekit itself,
what restores each tensor's L1 norm (`l1`).

| recipe | whose | factor | elements | kept | σ from the density | beyond the bound |
|---|---|---|---:|---:|---:|---:|
{dare}
"""


@dataclass(frozen=True, slots=True)
class Results:
    """All that was measured."""

    versions: Mapping[str, str]
    """The other tools' versions."""
    parity: Mapping[Case, Distance]
    """Cases that have to agree."""
    rounded: Mapping[Case, Distance]
    """Cases for information."""
    dare: MutableMapping[tuple[Case, str, str], Mask]
    """Masks, by case, tool and rescale factor."""
    stored: Mapping[Case, Distance] = field(default_factory=dict)
    """Cases of float32 arithmetic that is stored as bfloat16."""
    opened: Sequence[Opened] = ()
    """Merges of other architectures."""
    spoken: Sequence[Compared] = ()
    """Random recipes in all of the language."""
    adapters: Sequence[Merged] = ()
    """Merges with LoRA adapters."""
    several: Sequence[SeveralCompared] = ()
    """Random recipes of several documents."""
    words: Sequence[ComparedWords] = ()
    """Random recipes over different vocabularies."""
    exact: MutableMapping[str, Nearness] = field(default_factory=dict)
    """How far both tools are from float64 where the bound is wider, by method."""

    def problems(self) -> Iterator[str]:
        """One sentence for everything that is not as it has to be."""
        for case, distance in self.parity.items():
            if (distance.over and not is_excepted(case)) or not distance.elements:
                yield f"{case.name}: {distance.over} of {distance.elements} elements beyond the bound"
            if distance.undefined > distance.elements // 10 and not is_excepted(case):
                yield f"{case.name}: {distance.undefined} elements are undefined, too many to tell"
        for case, distance in self.stored.items():
            if distance.over or not distance.elements:
                yield f"{case.name}: {distance.over} of {distance.elements} are not float32 results rounded once"
        for (case, tool, factor), mask in self.dare.items():
            if mask.sigmas(density_of(case)) > SIGMAS:
                yield f"{case.name} ({tool}, {factor}): keeps {mask.fraction:.2%}"
            if mask.over:
                yield f"{case.name} ({tool}, {factor}): {mask.over} kept elements are not factor · τ"

    def too_few(self) -> Iterator[str]:
        """One sentence for every method, and every feature of the language, that is in too few recipes."""
        methods = Counter(case.method for case in self.parity)
        methods.update(each.spoken.method for each in self.spoken)
        features = Counter(feature for each in self.spoken for feature in each.spoken.features)
        features.update(feature for each in self.words for feature in each.worded.features)
        features.update({"several documents": len(self.several)})
        features.update({"adapters": sum(each.tool == "mergekit" for each in self.adapters)})
        for least, found in ((LEAST_OF_A_METHOD, methods), (LEAST_OF_A_FEATURE, features)):
            yield from (
                f"{name} is in {count} recipes, fewer than {least}"
                for name, count in found.items()
                if count < least
            )


def density_of(case: Case) -> float:
    """The density of a DARE case's one model."""
    return float(case.recipe["models"][0]["parameters"]["density"])


def total(distances: Mapping[str, Distance]) -> Distance:
    """All tensors of one case together."""
    return reduce(add, distances.values(), Distance())


def markdown(results: Results, opened: int, problems: Sequence[str]) -> str:
    """The document."""
    tools = ", ".join(f"{tool} {version}" for tool, version in results.versions.items())
    agreeing = (
        sum(not is_excepted(case) for case in results.parity)
        + len(results.spoken)
        + len(results.several)
        + len(results.words)
        + len(results.stored)
        + len(results.adapters)
    )
    outcome = (
        f"{agreeing} recipes agree in every element that is defined, and transformers opens all\n{opened} merged "
        "checkpoints and generates from them."
        if not problems
        else "**Not as it should be:**\n\n" + "\n".join(f"- {problem}" for problem in problems)
    )
    return WORDS.format(
        semantics=SEMANTICS_VERSION,
        versions=tools,
        architectures=architecture_table(results.opened),
        outcome=outcome,
        sigmas=SIGMAS,
        parity="\n".join(
            _parity(case, distance) for case, distance in results.parity.items() if case not in METHOD_CASES
        ),
        count=COUNT,
        methods="\n".join(_method(method, results.parity) for method in RECIPES),
        exceptions="\n".join(f"- `{method}`: {reason}." for method, reason in EXCEPTIONS.items()),
        languages=len(results.spoken),
        spoken=spoken_table(results.spoken),
        chains=len(results.several),
        several=several_table(results.several),
        worded=len(results.words),
        words=words_table(results.words),
        exact="\n".join(_exact(method, found) for method, found in results.exact.items()),
        adapters=adapter_table(results.adapters),
        stored="\n".join(
            _stored(method, results.stored) for method in sorted({c.method for c in results.stored})
        ),
        rounded="\n".join(_rounded(case, distance) for case, distance in results.rounded.items()),
        dare="\n".join(
            f"| {case.name} | {tool} | {factor} | {mask.elements:,} | {mask.fraction:.2%} "
            f"| {mask.sigmas(density_of(case)):.1f} | {mask.over} |"
            for (case, tool, factor), mask in results.dare.items()
        ),
    )


def _parity(case: Case, found: Distance) -> str:
    same = 1 - found.differing / max(1, found.elements)
    cells = (
        case.name,
        f"{found.elements:,}",
        f"{found.undefined:,}",
        f"{same:.2%}",
        found.over,
        f"{found.worst:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _method(method: str, parity: Mapping[Case, Distance]) -> str:
    """All of a method's random recipes together."""
    of = {case: parity[case] for case in METHOD_CASES if case.method == method and case in parity}
    found = reduce(add, (each for case, each in of.items() if not is_excepted(case)), Distance())
    apart = reduce(add, (each for case, each in of.items() if is_excepted(case)), Distance())
    cells = (
        method,
        sum(not is_excepted(case) for case in of),
        f"{found.elements:,}",
        f"{found.undefined:,}",
        f"{1 - found.differing / max(1, found.elements):.2%}",
        found.over,
        f"{found.worst:.2f}",
        sum(map(is_excepted, of)) or "",
        f"{apart.over / apart.elements:.2%}" if apart.elements else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _exact(method: str, found: Nearness) -> str:
    cells = (
        method,
        f"{found.ours.elements:,}",
        found.ours.over,
        f"{found.ours.worst:.2f}",
        found.theirs.over,
        f"{found.theirs.worst:.2f}",
        found.verdict,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _stored(method: str, stored: Mapping[Case, Distance]) -> str:
    own = [found for case, found in stored.items() if case.method == method]
    found = reduce(add, own, Distance())
    different = found.differing / max(1, found.elements)
    return f"| {method} | {len(own)} | {found.elements:,} | {found.undefined:,} | {different:.3%} | {found.over} |"


def _rounded(case: Case, found: Distance) -> str:
    different = found.differing / max(1, found.elements)
    return f"| {case.name} | {found.elements:,} | {found.undefined:,} | {different:.2%} |"
