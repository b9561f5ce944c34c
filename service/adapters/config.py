"""adapter_config.json of a LoRA adapter: what it multiplies by, and what is refused because it is no plain delta. Pure.

Reference: PEFT's LoraConfig and what its merging does, which running it established. A key that nothing here knows
may change what an adapter means, so one that is set is refused as well.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workers.safetensors_format import clip

MAX_CONFIG_BYTES = 4 << 20
"""Longest adapter_config.json that is read."""
MAX_CONFIG_VALUES = 1 << 17
"""Most JSON values of one."""
MAX_MATCHES = 1 << 21
"""Most comparisons of a pattern with the name of a module: every pattern may meet every module."""
MAX_EXPRESSION_MATCHES = 1 << 13
"""Of these, most where the pattern is more than a name."""
MAX_PATTERNS = 1 << 14
"""Most patterns of a mapping: each is compiled."""
MAX_SAVED = 256
"""Most modules that are held whole: each is looked for in the names of tensors."""
MAX_EXPRESSIONS = 64
"""Most patterns that are more than a name."""
MAX_STEPS = 1 << 30
"""Most steps of all comparisons together, each at its worst: some seconds."""

_MEANINGLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode", "peft_type",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying", "merge_weights", "enable_lora", "modules_to_save", "r", "lora_alpha",
    "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "init_lora_weights",
))  # fmt: skip
"""Keys that are read here, or that say how the adapter was trained and not what it is."""

_REFUSED = {
    "use_dora": "DoRA scales each row of the weights by its length",
    "lora_bias": "the factors have biases of their own",
    "layer_replication": "layers of the base model are repeated",
    "target_parameters": "it changes parameters that are no module's weight, such as stacked experts",
    "trainable_token_indices": "single rows of the embedding are replaced",
    "use_qalora": "QA-LoRA pools the inputs in groups",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "kasa_config": "KaSA changes the base model's weights",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "arrow_config": "Arrow routes each token to other adapters",
    "alora_invocation_tokens": "an activated LoRA holds only after certain tokens",
}
"""Keys that make an adapter something else than a plain delta where they are set, and why."""

_REPLACING = re.compile(r"pissa.*|corda.*|olora|lora_ga", re.IGNORECASE)
"""Initialisations that change the base model, which PEFT repeats when such an adapter is loaded."""

_LITERAL = re.compile(r"\^?(?:[^\\()\[\]{}*+?|^$]|\\\W)*\$?")
_TEXT = re.compile(r"(?:[\w\- /:]|\\[.\-_])*")
_ATOM = r"(?:[\w\- /:]|\.|\\[dwsDWS.\-_]|\[\^?[\w.\- \\]+\])"
_GROUP = re.compile(rf"\((?:\?:)?(?:{_ATOM}[*+?]?|\|)*\)\??")
_PLAIN = re.compile(rf"\^?(?:{_ATOM}[*+?]?|\|)*\$?")
_MOST_REPEATS = 2
_MOST_WAYS = 64
_MOST_CHARACTERS = 256
_MOST_DOTS = 24


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says of the arithmetic."""

    rank: int
    """``r``."""
    alpha: float
    """``lora_alpha``."""
    rank_pattern: Mapping[str, int]
    """Other ranks, by a pattern of modules' names."""
    alpha_pattern: Mapping[str, float]
    """Other alphas, likewise."""
    is_rank_stabilised: bool
    """``use_rslora``: the scale is alpha over the square root of the rank."""
    fan_in_fan_out: bool
    """Weights are stored as ``[in, out]``, as GPT-2's are."""
    modules_to_save: tuple[str, ...]
    """Modules that the adapter holds whole."""
    base: str | None = None
    """The model that it was trained on, as it says."""

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        found = _first(self._ranks, module)
        return self.rank if found is None else self.rank_pattern[found]

    def scale_of(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        found = _first(self._alphas, module)
        alpha = self.alpha if found is None else self.alpha_pattern[found]
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def excess(self, modules: Sequence[str]) -> str | None:
        """What makes it too much work to compare the patterns with the names of these modules."""
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        if not patterns:
            return None
        if long := next((name for name in modules if _is_long(name)), None):
            return f"the name of the module {clip(long)} is too long to be compared with patterns"
        expressions = sum(not _LITERAL.fullmatch(pattern) for pattern in patterns)
        if (
            len(patterns) * len(modules) > MAX_MATCHES
            or expressions * len(modules) > MAX_EXPRESSION_MATCHES
            or _steps(patterns, modules) > MAX_STEPS
        ):
            return f"{len(patterns)} patterns for {len(modules)} modules are more than are compared"
        return None

    def is_saved_whole(self, module: str) -> bool:
        """Whether a module is one of those that the adapter holds whole, or lies in one."""
        return any(f".{name}." in f".{module}." for name in self.modules_to_save)

    @cached_property
    def _ranks(self) -> dict[str, re.Pattern[str]]:
        return _compiled(self.rank_pattern)

    @cached_property
    def _alphas(self) -> dict[str, re.Pattern[str]]:
        return _compiled(self.alpha_pattern)


def read_config(document: Mapping[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The config that a JSON object says, and what is wrong with it or not supported; one or the other."""
    problems = _kind_problems(document)
    rank, alpha = document.get("r", 8), document.get("lora_alpha", 8)
    if not _is_rank(rank):
        problems.append("`r` must be a positive whole number")
    if not _is_number(alpha):
        problems.append("`lora_alpha` must be a number")
    patterns = {}
    for name, fits, wanted in (
        ("rank_pattern", _is_rank, "positive whole numbers"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        value = document.get(name) or {}
        if not isinstance(value, dict) or not all(map(fits, value.values())):
            problems.append(f"`{name}` must map patterns of modules' names to {wanted}")
        else:
            problems += pattern_problems(name, list(value))
            patterns[name] = value
    saved = document.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        problems.append("`modules_to_save` must be a list of names")
    elif len(saved) > MAX_SAVED:
        problems.append(
            f"`modules_to_save` names {len(saved)} modules, more than the {MAX_SAVED} that are read"
        )
    flags = {name: document.get(name) or False for name in ("use_rslora", "fan_in_fan_out")}
    problems += [
        f"`{name}` must be true or false" for name, value in flags.items() if value not in (True, False)
    ]
    if problems:
        return None, problems
    base = document.get("base_model_name_or_path")
    config = AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern={key: float(value) for key, value in patterns["alpha_pattern"].items()},
        is_rank_stabilised=flags["use_rslora"],
        fan_in_fan_out=flags["fan_in_fan_out"],
        modules_to_save=tuple(saved),
        base=base if isinstance(base, str) else None,
    )
    return config, []


def _kind_problems(document: Mapping[str, Any]) -> list[str]:
    """What makes it another kind of adapter than a plain LoRA."""
    kind = document.get("peft_type")
    if kind != "LORA":
        return [
            f"`peft_type` is {clip(repr(kind))}: only LORA is read, whose deltas are products of two matrices"
        ]
    problems = [
        f"`{key}` is set, which is not supported: {why}" for key, why in _REFUSED.items() if document.get(key)
    ]
    bias = document.get("bias", "none")
    if bias not in ("none", None):
        problems.append(f"`bias` is {clip(repr(bias))}: trained biases are not supported, only weights")
    start = document.get("init_lora_weights", True)
    if isinstance(start, str) and _REPLACING.fullmatch(start):
        problems.append(
            f"`init_lora_weights` is {clip(repr(start))}, which also changes the base model's weights: save the "
            "adapter converted to a plain LoRA (PEFT's `path_initial_model_for_weight_conversion`)"
        )
    unknown = [
        key for key, value in document.items() if value and key not in _MEANINGLESS and key not in _REFUSED
    ]
    problems += [
        f"{clip(repr(key))} is set, which is not known here and may change what the adapter means: remove it if "
        "it does not"
        for key in unknown
    ]
    return problems


def pattern_problems(name: str, patterns: Sequence[str]) -> list[str]:
    """What is wrong with the patterns of one of the two mappings.

    They are regular expressions from strangers, and so only those are taken whose matching is quick whatever they are
    matched with: names, ``.``, ``\\d``, sets, simple groups of alternatives, two repeats at most, and few ways in all
    for groups and ``?`` to match the same text.
    """
    if len(patterns) > MAX_PATTERNS:
        return [f"`{name}` has {len(patterns)} patterns, more than the {MAX_PATTERNS} that are read"]
    problems = []
    if long := next((pattern for pattern in patterns if len(pattern) > _MOST_CHARACTERS), None):
        problems.append(
            f"`{name}` has the pattern {clip(repr(long))} of more than {_MOST_CHARACTERS} characters"
        )
    expressions = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    if len(expressions) > MAX_EXPRESSIONS:
        problems.append(
            f"`{name}` has {len(expressions)} regular expressions, more than the {MAX_EXPRESSIONS} read"
        )
    for pattern in expressions[:MAX_EXPRESSIONS]:
        if len(pattern) <= _MOST_CHARACTERS and not (_is_quick(pattern) and _compiles(pattern)):
            problems.append(
                f"`{name}` has the regular expression {clip(repr(pattern))}; taken are names with `.`, `\\d`, sets, "
                f"groups of alternatives, at most two of `*` and `+`, and at most {_MOST_WAYS} ways for groups and "
                "`?` to match the same text"
            )
    return problems


def _is_quick(pattern: str) -> bool:
    if re.search(r"\)[*+]", _bare(pattern)) or _repeats(pattern) > _MOST_REPEATS:
        return False
    return _PLAIN.fullmatch(_GROUP.sub(".", pattern)) is not None and _ways(pattern) <= _MOST_WAYS


def _bare(pattern: str) -> str:
    """A pattern whose sets and escaped characters are plain ones."""
    return re.sub(r"\\.|\[[^\]]*\]", "x", pattern)


def _repeats(pattern: str) -> int:
    bare = _bare(pattern)
    return bare.count("*") + bare.count("+")


def _ways(pattern: str) -> int:
    """In how many ways, at most, a pattern matches from a place in a text on, were there no repeats in it."""
    groups = [group.removeprefix("(").removeprefix("?:") for group in _GROUP.findall(pattern)]
    ways = _choices(_GROUP.sub(".", pattern))
    for group in groups:
        ways *= _choices(group.rstrip("?").removesuffix(")")) + group.endswith("?")
    return ways


def _choices(alternatives: str) -> int:
    """How many of some alternatives may match at one place; of plain texts those that others begin with."""
    each = alternatives.split("|")
    if not all(map(_TEXT.fullmatch, each)):
        return sum(1 << one.count("?") for one in each)
    texts = [one.replace("\\", "") for one in each]
    return max(sum(text.startswith(other) for other in texts) for text in texts)


def _steps(patterns: Sequence[str], modules: Sequence[str]) -> int:
    """How many characters are looked at, at most, to compare each pattern with each module's name.

    A pattern is tried at the beginning and after each dot, with each of its ways and with every division of the name
    among its repeats, each time from its first character to its last.
    """
    divisions = [
        sum((1 + name.count(".")) * math.comb(len(name) + repeats, repeats) for name in modules)
        for repeats in range(_MOST_REPEATS + 1)
    ]
    return sum(
        len(pattern)
        * (divisions[0] if _LITERAL.fullmatch(pattern) else _ways(pattern) * divisions[_repeats(pattern)])
        for pattern in patterns
    )


def _is_long(module: str) -> bool:
    return len(module) > _MOST_CHARACTERS or module.count(".") > _MOST_DOTS


def _compiles(pattern: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except (re.error, Warning):
        return False
    return True


def _compiled(patterns: Mapping[str, object]) -> dict[str, re.Pattern[str]]:
    """As PEFT matches them: to the end of a module's name, from its beginning or after a dot."""
    return {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns}


def _first(patterns: Mapping[str, re.Pattern[str]], module: str) -> str | None:
    return next((pattern for pattern, compiled in patterns.items() if compiled.match(module)), None)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
