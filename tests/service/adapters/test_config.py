"""adapter_config.json: scales and ranks by PEFT's rules, and everything that is no plain delta refused by name."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.adapters.config import AdapterConfig, pattern_problems, read_config
from tests.adapters import CONFIG

pytestmark = pytest.mark.fast

LAYER = "model.layers.3.self_attn."


def config(**changes: Any) -> AdapterConfig:
    found, problems = read_config(CONFIG | changes)
    assert problems == []
    assert found is not None
    return found


def test_scales_are_alpha_over_the_rank_or_its_root() -> None:
    assert config(lora_alpha=16).scale_of("x", 4) == 4.0
    assert config(lora_alpha=16, use_rslora=True).scale_of("x", 8) == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    ("patterns", "module", "rank"),
    [
        ({"q_proj": 2}, f"{LAYER}q_proj", 2),
        ({"q_proj": 2}, f"{LAYER}eq_proj", 4),  # a whole component, not what one ends with
        ({"self_attn.q_proj": 2}, f"{LAYER}q_proj", 2),
        ({"proj": 2}, f"{LAYER}q_proj", 4),
        ({"layers.3.self_attn": 2}, f"{LAYER}q_proj", 4),  # to the end of the name
        ({r"layers\.\d+\.self_attn\.(q|k)_proj": 2}, f"{LAYER}k_proj", 2),
        ({r"layers\.[0-2]\..*": 2}, f"{LAYER}k_proj", 4),
        ({".*self_attn.*": 2, "q_proj": 3}, f"{LAYER}q_proj", 2),  # the first that fits
        ({"q_proj": 3, ".*self_attn.*": 2}, f"{LAYER}q_proj", 3),
        ({f"^{LAYER}q_proj": 2}, f"{LAYER}q_proj", 2),
    ],
)
def test_patterns_mean_what_peft_makes_of_them(patterns: dict[str, int], module: str, rank: int) -> None:
    assert config(rank_pattern=patterns).rank_of(module) == rank
    alphas = {key: 3.0 * value for key, value in patterns.items()}
    assert config(alpha_pattern=alphas).scale_of(module, 2) == (3.0 * rank if rank != 4 else 8) / 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "`peft_type` is 'LOHA': only LORA is read"),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"use_dora": True}, "`use_dora` is set, which is not supported: DoRA"),
        ({"bias": "all"}, "`bias` is 'all': trained biases"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only'"),
        ({"lora_bias": True}, "`lora_bias` is set"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication` is set"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "`target_parameters` is set"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` is set"),
        ({"use_qalora": True}, "`use_qalora` is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights` is 'olora'"),
        ({"use_tomorrows": True}, "'use_tomorrows' is set, which is not known here"),
        ({"r": 0}, "`r` must be"),
        ({"r": True}, "`r` must be"),
        ({"lora_alpha": "16"}, "`lora_alpha` must be"),
        ({"lora_alpha": math.nan}, "`lora_alpha` must be"),
        ({"lora_alpha": 10**400}, "`lora_alpha` must be"),
        ({"rank_pattern": {"q_proj": 1.5}}, "`rank_pattern` must map"),
        ({"alpha_pattern": [1]}, "`alpha_pattern` must map"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` must be"),
        ({"use_rslora": "yes"}, "`use_rslora` must be"),
    ],
)
def test_what_is_wrong_or_no_plain_delta_is_named(changes: dict[str, Any], says: str) -> None:
    found, problems = read_config(CONFIG | changes)
    assert found is None
    assert len(problems) == 1
    assert problems[0].startswith(says)


def test_several_problems_are_told_at_once() -> None:
    _, problems = read_config(CONFIG | {"use_dora": True, "bias": "all", "r": -1})
    assert len(problems) == 3


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "loftq", "orthogonal"])
def test_how_training_began_makes_no_difference(start: object) -> None:
    assert config(init_lora_weights=start, loftq_config={"loftq_bits": 4}, runtime_config={"x": 1}).rank == 4


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)*b", "(a+)+$", "(a|a)*b", ".*.*.*x", r"(?=a)b", r"(a)\1", "[", "a{9}", "a**", "x" * 257 + "*", "." * 257,
        "a?" * 85 + "a" * 85, "(aa|a)" * 40 + "b", "(a|a)" * 7, "(a?|b)" * 9, "(a)?" * 9, "(?:a|.)" * 7, r"(-|\-)" * 7,
        "(a)??" * 5, "(a|b?c?d?e?f?g?)a?", "|".join("a" * 65),
    ],
)  # fmt: skip
def test_expressions_that_may_take_for_ever_are_refused(pattern: str) -> None:
    assert len(pattern_problems("rank_pattern", [pattern])) == 1


LAYERS = "|".join(map(str, range(80)))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj",
        rf"model\.layers\.({LAYERS})\..*",
        rf"layers\.({LAYERS[:86]})\.(self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
        r".*layers\.\d\.(self_attn|mlp)\..*",
        r"layers\.[0-9]?[0-9]\.(self_)?attn\.[qv]_proj",
        "q_proj|v_proj",
    ],
)
def test_usual_expressions_are_taken(pattern: str) -> None:
    names = [f"model.layers.{n}.self_attn.{each}_proj" for n in range(80) for each in "qkvo"]
    found = config(rank_pattern={pattern: 2})
    assert found.excess(names) is None
    assert found.rank_of(names[0]) == 2


PIECES = [
    "a",
    ".",
    r"\.",
    "a?",
    ".?",
    "[a.]",
    "[a.]?",
    ".*",
    "a*",
    "[a.]+",
    "(a|aa)",
    "(?:a|a|.a)",
    "(a|b)?",
    "|",
    "b",
    "$",
]
NAMES = ["a" * 256, "a" * 208 + ".a" * 24, "a." * 24 + "a" * 208, "a" * 120 + ".a" * 12 + "b"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.sampled_from(PIECES),
    st.integers(0, 100),
    st.sampled_from(NAMES),
)
def test_the_most_steps_that_are_allowed_are_a_matter_of_seconds(
    ends: list[str], piece: str, count: int, name: str
) -> None:
    for pattern in ("".join(ends) + piece * count, piece * count + "".join(ends)):
        found, _ = read_config(CONFIG | {"rank_pattern": {pattern: 2}})
        if found is not None and found.excess([name]) is None:
            before = time.process_time()
            found.rank_of(name)
            assert time.process_time() - before < 4


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=r"a.*+?()|[]\d^$", max_size=24))
def test_every_expression_that_is_taken_is_quick(pattern: str) -> None:
    if pattern_problems("rank_pattern", [pattern]):
        return
    before = time.process_time()
    re.compile(rf"(.*\.)?({pattern})$").match("a" * 120 + ".a" * 12 + "b")
    assert time.process_time() - before < 0.5


def test_the_ways_of_a_pattern_count_in_what_is_compared() -> None:
    names = [f"{'a.' * 20}{n:05}{'a' * 200}" for n in range(100)]
    assert config(rank_pattern={"a.*": 2}).excess(names) is None
    assert "1 patterns for 100 modules" in str(config(rank_pattern={".*(a|a).*(a|a)x": 2}).excess(names))


def test_names_in_which_each_character_is_any_are_compared_with_short_names() -> None:
    assert "too long" in str(config(rank_pattern={"." * 200 + "x": 2}).excess(["." * 200]))
    patterns = {"." * 200 + f"x{n}": 2 for n in range(4000)}
    names = [f"{'.' * 24}{n}{'a' * 200}" for n in range(500)]
    assert "4000 patterns for 500 modules" in str(config(rank_pattern=patterns).excess(names))


@settings(deadline=None)
@given(st.text(max_size=24))
def test_an_escaped_name_is_a_name(name: str) -> None:
    patterns = {f"^{re.escape(name)}{n}": 2 for n in range(100)}
    found = config(rank_pattern=patterns)
    assert found.excess([f"{name}{n}" for n in range(100)]) is None
    assert (found.rank_of(f"{name}99"), found.rank_of(f"{name}100")) == (2, 4)


def test_thousands_of_patterns_for_thousands_of_modules_are_refused() -> None:
    names = [f"layers.{n}.q_proj" for n in range(2000)]
    assert config(rank_pattern=dict.fromkeys(names[:1000], 2)).excess(names[:1000]) is None
    assert "2000 patterns" in str(config(rank_pattern=dict.fromkeys(names, 2)).excess(names))
    regex = {rf"layers\.{n}\..*": 2 for n in range(60)}
    assert config(rank_pattern=regex).excess(names[:100]) is None
    assert "60 patterns" in str(config(rank_pattern=regex).excess(names[:200]))
    assert "too long" in str(config(rank_pattern=regex).excess(["a." * 200]))
