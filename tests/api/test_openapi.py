"""The OpenAPI document is valid, complete, and says of errors what is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openapi_spec_validator import validate

from api.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.fast

KEYED = {401, 403, 429, 503}
"""What every route may answer that wants a key."""

PROBLEMS = {
    ("post", "/v1/merges"): {400, 408, 413, 415, 422} | KEYED,
    ("get", "/v1/merges"): {400, 422} | KEYED,
    ("get", "/v1/merges/{job}"): {404} | KEYED,
    ("delete", "/v1/merges/{job}"): {404, 409} | KEYED,
    ("post", "/v1/merges/{job}/cancel"): {404, 409} | KEYED,
    ("get", "/v1/merges/{job}/events"): {400, 404} | KEYED,
    ("get", "/v1/merges/{job}/deliveries"): {404} | KEYED,
    ("get", "/v1/merges/{job}/files"): {404, 409, 410, 502} | KEYED,
    ("get", "/v1/merges/{job}/files/{name}"): {404, 409, 410, 502} | KEYED,
    ("post", "/v1/plans"): {400, 408, 413, 415, 422, 502} | KEYED,
    ("get", "/v1/methods"): KEYED,
    ("get", "/healthz"): set(),
    ("get", "/readyz"): {503},
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document as a client gets it."""
    app = create_app(Settings())
    found: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    assert app.openapi() == found  # asked for twice
    return found


def test_it_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = list(_references(document))
    assert "#/components/schemas/OptionsBody" in references
    for reference in references:
        node = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    assert "HTTPValidationError" not in json.dumps(document)


def test_every_problem_is_declared(document: dict[str, Any]) -> None:
    declared = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            errors = {int(status): answer for status, answer in operation["responses"].items()}
            declared[method, path] = {status for status in errors if status >= 400 and status != 416}
            for status in declared[method, path]:
                schema = errors[status]["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}
    assert declared == PROBLEMS


def test_answers_are_typed(document: dict[str, Any]) -> None:
    for path, status, model in (
        ("/v1/plans", "200", "PlanInfo"), ("/readyz", "200", "Readiness"), ("/v1/merges", "202", "Job")
    ):  # fmt: skip
        operations = document["paths"][path]
        answer = operations.get("post", operations.get("get"))["responses"][status]
        assert answer["content"]["application/json"]["schema"]["$ref"].endswith(f"/{model}")


def test_every_field_is_described(document: dict[str, Any]) -> None:
    bare = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, described in schema.get("properties", {}).items()
        if not described.get("description")
    ]
    assert bare == []
    given = document["paths"]["/v1/plans"]["post"]["parameters"]
    parameters = {parameter["name"]: parameter for parameter in given}
    assert {"output", "overwrite", "part_bytes"} <= parameters.keys()
    assert all(parameter["description"] for parameter in parameters.values())


def _references(node: Any) -> Any:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
