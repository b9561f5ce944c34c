"""Chat templates: a model's, the one that most models have, one of those known by name, or the recipe's own. Pure.

The named ones are written anew from the formats of the models that they are called after. For conversations of system,
user and assistant they render as mergekit 0.1.5's do, but for white space that its `llama3`, `exaone` and `alpaca` have
too much or too little of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}{{ '\\n' }}{{ message.content }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}{{ message.content | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% set has_system = messages[0].role == 'system' %}{{ bos_token }}"
        "{% for message in (messages[1:] if has_system else messages) %}"
        "{% if message.role not in ('user', 'assistant') or (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('After an optional system message, user and assistant take turns.') }}{% endif %}"
        "{% if message.role == 'user' %}"
        " [INST] {% if has_system and loop.first %}{{ messages[0].content }}{{ '\\n\\n' }}{% endif %}"
        "{{ message.content }} [/INST]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "exaone": (
        "{% if messages[0].role != 'system' %}[|system|][|endofturn|]{{ '\\n' }}{% endif %}"
        "{% for message in messages %}"
        "[|{{ message.role }}|]{{ message.content }}"
        "{% if message.role != 'user' %}[|endofturn|]{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "alpaca": (
        "{% set heads = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
        "{% for message in messages if message.role == 'system' %}"
        "{% if loop.last %}{{ message.content | trim }}{% endif %}{% endfor %}{{ '\\n\\n' }}"
        "{% for message in messages if message.role in heads %}"
        "### {{ heads[message.role] }}:{{ '\\n' }}{{ message.content | trim }}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        "{{ '\\n\\n' }}### Response:{{ '\\n' }}{% endif %}"
    ),
}
"""Templates by name."""

AUTO = "auto"


def template_of(settings: Mapping[str, Any] | None, file: str | None) -> str | None:
    """A model's template: that of its own file, else that of its tokenizer_config.json; of several the default one."""
    if file is not None:
        return file
    found = (settings or {}).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [each for each in found if isinstance(each, Mapping) and each.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) else None


def commonest(templates: Mapping[str, str | None]) -> str | None:
    """The template that most models have, of equals the first model's; ``None`` when none has any."""
    counted = Counter(text for text in templates.values() if text is not None)
    return max(counted, key=counted.__getitem__, default=None)


def is_template(text: str) -> bool:
    """Whether a text can be a template, and not a name."""
    return "{{" in text or "{%" in text
