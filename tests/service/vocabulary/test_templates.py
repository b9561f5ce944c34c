"""Chat templates: whose they are, and what the named ones render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from service.vocabulary.templates import NAMED, commonest, template_of
from tests.service.vocabulary.models import ONE, planned, write_model
from workers.errors import PlanError

pytestmark = pytest.mark.fast

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]


def rendered(name: str, messages: list[dict[str, str]], *, ask: bool = True) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - text, as in transformers

    def refuse(message: str) -> None:
        raise ValueError(message)

    return environment.from_string(NAMED[name]).render(
        messages=messages,
        add_generation_prompt=ask,
        bos_token="<s>",
        eos_token="</s>",
        raise_exception=refuse,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hello <|im_end|>\n<|im_start|>assistant\n"
            "Hi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\n",
        ),
        ("mistral", "<s> [INST] Be kind.\n\n Hello  [/INST] Hi.</s> [INST] Bye [/INST]"),
        (
            "exaone",
            "[|system|]Be kind.[|endofturn|]\n[|user|] Hello \n[|assistant|]Hi.[|endofturn|]\n[|user|]Bye\n"
            "[|assistant|]",
        ),
        (
            "alpaca",
            "Be kind.\n\n### Instruction:\nHello\n\n### Response:\nHi.\n\n### Instruction:\nBye\n\n### Response:\n",
        ),
    ],
)
def test_named_templates_render_the_formats_that_they_are_called_after(name: str, expected: str) -> None:
    assert rendered(name, TALK) == expected


def test_mistral_refuses_turns_that_do_not_alternate() -> None:
    assert rendered("mistral", TALK[1:3]) == "<s> [INST]  Hello  [/INST] Hi.</s>"
    with pytest.raises(ValueError, match="take turns"):
        rendered("mistral", [TALK[1], TALK[1]])


def test_a_models_template_is_that_of_its_own_file_else_that_of_its_settings() -> None:
    assert template_of({"chat_template": "a"}, "b") == "b"
    assert template_of({"chat_template": "a"}, None) == "a"
    assert (
        template_of(
            {"chat_template": [{"name": "x", "template": "a"}, {"name": "default", "template": "b"}]}, None
        )
        == "b"
    )
    assert template_of({"chat_template": 3}, None) is None
    assert template_of(None, None) is None


def test_the_commonest_template_is_the_first_of_equals() -> None:
    assert commonest({"a": "1", "b": "2", "c": "2", "d": None}) == "2"
    assert commonest({"a": None, "b": "1", "c": "2"}) == "1"
    assert commonest({"a": None}) is None


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    texts = [{}, {"chat_template.jinja": "{{ 'T1' }}"}, {"chat_template.jinja": "{{ 'T2' }}"}]
    return [write_model(tmp_path / f"m{number}", number, ONE, more=more) for number, more in enumerate(texts)]


def written(places: list[Path], wanted: str) -> tuple[str, Any]:
    found = planned(places, chat_template=wanted)
    return found.texts["chat_template.jinja"].decode(), json.loads(found.texts["tokenizer_config.json"])[
        "chat_template"
    ]


def test_the_template_that_is_asked_for_is_written_where_old_and_new_versions_look(
    models: list[Path],
) -> None:
    assert written(models, "auto") == ("{{ 'T1' }}", "{{ 'T1' }}")
    assert written([*models, write_model(models[0].parent / "m3", 3, ONE, more={"chat_template.jinja": "{{ 'T2' }}"})],
                   "auto") == ("{{ 'T2' }}", "{{ 'T2' }}")  # fmt: skip
    assert written(models, str(models[2]))[0] == "{{ 'T2' }}"
    assert written(models, "llama3")[0] == NAMED["llama3"]
    assert written(models, "{% for m in messages %}{% endfor %}")[0] == "{% for m in messages %}{% endfor %}"
    assert not planned(models[:1], chat_template="auto").texts
    assert planned(models[1:]).copied.keys() >= {
        "chat_template.jinja"
    }  # the reference's own is copied as ever


@pytest.mark.parametrize(
    ("wanted", "says"), [("vicuna", "'vicuna' is not `auto`, one of alpaca"), ("0", "has no chat")]
)
def test_what_is_no_template_is_refused(wanted: str, says: str, models: list[Path]) -> None:
    with pytest.raises(PlanError, match=says):
        planned(models, chat_template=str(models[0]) if wanted == "0" else wanted)
