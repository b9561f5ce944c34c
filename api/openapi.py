"""The OpenAPI document: what FastAPI cannot see, because bodies are read and errors are written by our own code."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from api.observing import Observing
from api.schemas import MergeRequest, PlanRequest, Problem

PROBLEM = "application/problem+json"

_REFERENCE = "#/components/schemas/{model}"
_UNSEEN = (MergeRequest, PlanRequest, Problem)
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")


class Application(FastAPI):
    """FastAPI with a document that is true: problems are what errors are sent as. Every request is observed."""

    def build_middleware_stack(self) -> ASGIApp:
        """What is called for each request: outside of all that Starlette puts around the routes."""
        return Observing(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            _, unseen = models_json_schema(
                [(model, "validation") for model in _UNSEEN], ref_template=_REFERENCE
            )
            schemas = document["components"]["schemas"]
            schemas.update(unseen["$defs"])
            for name in _FASTAPIS_OWN:
                schemas.pop(name, None)
            for operations in document["paths"].values():
                for operation in operations.values():
                    _drop_validation_error(operation["responses"])
        return super().openapi()


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with these problems."""
    content = {PROBLEM: {"schema": _schema(Problem)}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def recipe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route that takes ``model`` as JSON, or a recipe as YAML."""
    yaml = {"type": "string", "description": "mergekit's YAML; the rest goes into query parameters"}
    content = {"application/json": {"schema": _schema(model)}, "application/yaml": {"schema": yaml}}
    return {"requestBody": {"required": True, "content": content}}


def _schema(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _drop_validation_error(responses: dict[str, Any]) -> None:
    """Forget the 422 that FastAPI declares for every route with a parameter, even one that any text fits."""
    schema = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if schema.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]
