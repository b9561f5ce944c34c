"""What each parameter and switch means is said in the schema, and docs/methods.md says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergemill.local import methods_here

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[2] / "docs/methods.md"
HIDDEN = {"int8_mask", "eps"}
"""What is only accepted, and does nothing."""
PROFILES = ("paper", "mergekit")
METHODS = methods_here()


def properties(method: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of a method and its models, by name."""
    return {
        **method["model_parameters"].get("properties", {}),
        **method["parameters"].get("properties", {}),
    }


def code(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(*rows: list[str]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def values_of(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return code(schema["const"])
    if "enum" in schema:
        return " ".join(map(code, schema["enum"]))
    if schema["type"] == "boolean":
        return "`true` `false`"
    if schema.get("maximum") is not None:
        return f"{schema['minimum']:g} to {schema['maximum']:g}"
    return "0 or more" if schema.get("minimum") == 0 else "number"


def meanings() -> str:
    """Every parameter, its methods, values, default and meaning."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in METHODS:
        for name, schema in properties(method).items():
            if name not in HIDDEN:
                default = code(schema["default"]) if "default" in schema else "required"
                row = (code(name), values_of(schema), default, " ".join(schema["description"].split()))
                found.setdefault(row, []).append(code(method["name"]))
    rows = [[row[0], ", ".join(methods), *row[1:]] for row, methods in found.items()]
    return table(["parameter", "of", "values", "default", "meaning"], *rows)


def methods() -> str:
    """Every method, what it computes, what it takes and what it costs."""
    rows = []
    for method in METHODS:
        least, most = method["min_models"], method["max_models"]
        count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        base = {"required": " and a base", "optional": ", a base if wanted"}.get(method["base"], "")
        known = f", a `{method['statistic']}` of each" if method["statistic"] else ""
        whole = method["whole_bytes_per_element"]
        cost = f"whole tensors, {whole} bytes an element" if whole else f"{method['most_reads']} reads"
        formula = method["formula"].replace("|", "\\|")
        rows.append(
            [
                code(method["name"]),
                formula,
                count + base + known,
                cost.replace("1 reads", "1 read"),
                method["paper"],
            ]
        )
    return table(["method", "what comes out", "models", "cost when split", "source"], *rows)


def switches() -> str:
    """Every default that a profile changes."""
    rows = []
    for method in METHODS:
        for name, schema in properties(method).items():
            default = schema.get("default")
            under = [method["profiles"][profile].get(name, default) for profile in PROFILES]
            if any(value != default for value in under):
                rows.append([code(method["name"]), code(name), code(default), *map(code, under)])
    return table(
        ["method", "switch", "default", *(f"profile {code(profile)}" for profile in PROFILES)], *rows
    )


def test_every_parameter_and_each_of_its_values_is_explained() -> None:
    for method in METHODS:
        for name, schema in properties(method).items():
            assert schema.get("description"), (method["name"], name)
            assert method["formula"], method["name"]
            for value in schema.get("enum", []):
                assert f"`{value}`" in schema["description"], (method["name"], name, value)


def test_the_page_says_what_the_schema_says() -> None:
    text = PAGE.read_text()
    for expected in (methods(), meanings(), switches()):
        assert expected in text, f"docs/methods.md has to hold:\n\n{expected}\n"
    for method in METHODS:
        own, per_input = (method[key] >> 20 for key in ("workspace_bytes", "workspace_bytes_per_input"))
        assert f"a workspace of {own} MiB and {per_input} MiB for each input" in text
