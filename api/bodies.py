"""Recipes in request bodies: JSON, or YAML with the rest in the query. One reader for all routes that take one."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, TypeVar

from anyio import fail_after
from fastapi import Depends, Query, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from api.deps import plan_options
from api.schemas import MergeRequest, OptionsBody, PlanRequest, RecipeQuery
from api.webhooks import webhook_of
from service.planning.plan import PlanOptions
from service.planning.salvage import salvage
from service.recipe import Graph, graph_of, key_hint, load_yaml, parse_documents, validation_problems
from service.settings import Settings
from service.webhooks.webhooks import Webhook
from workers.errors import (
    MalformedRequestError,
    RecipeError,
    RequestTimeoutError,
    RequestTooLargeError,
    StoreError,
    UnsupportedMediaTypeError,
)
from workers.store.uris import normalise

MAX_BODY_BYTES: Final = 2 << 20
"""Longest body that is read."""

DRAINED_BYTES: Final = 16 << 20
"""Longest body that is let in and thrown away: a connection closed while it is written never shows our answer."""

BODY_SECONDS: Final = 60.0
"""Longest wait for the whole of a body, in seconds: 2 MiB take a minute at 35 kB/s."""

JSON_TYPE: Final = "application/json"
YAML_TYPES: Final = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")

_MOST_PROBLEMS = 50

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Body:
    """A body as it came. Parsing may take long, so it waits until a thread does it."""

    data: bytes
    """The bytes, without a byte order mark."""
    is_yaml: bool
    """Whether they are YAML, not JSON."""
    query: RecipeQuery
    """What the query says."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A merge that somebody wants run or planned, as far as it can be checked without looking anywhere."""

    recipe: Graph | None
    """The recipe; with problems, what is left of it, if there is anything to look at."""
    output: str | None
    """Normalised URI of the output, when it is given and there can be such a place."""
    options: PlanOptions
    """The request's options over the deployment's defaults; these alone when something is wrong with the former."""
    problems: tuple[str, ...]
    """What is wrong with the request itself."""
    webhook: Webhook | None = None
    """Who is to be told about it."""
    priority: int = 0
    """Which jobs are begun first."""


async def receive(request: Request, query: Annotated[RecipeQuery, Query()]) -> Body:
    """Take a body in, without looking into it.

    :raises UnsupportedMediaTypeError: it is neither JSON nor YAML.
    :raises RequestTooLargeError: it is longer than :data:`MAX_BODY_BYTES`.
    :raises RequestTimeoutError: it does not end within :data:`BODY_SECONDS`.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):  # what is compressed has no length until it is read
        raise UnsupportedMediaTypeError(f"a body with the Content-Encoding {encoding[:100]!r} is not read")
    kind = request.headers.get("content-type", JSON_TYPE).partition(";")[0].strip().lower()
    if kind != JSON_TYPE and kind not in YAML_TYPES:
        raise UnsupportedMediaTypeError(
            f"a body of the type {kind[:100]!r} is not read: set the header Content-Type to {JSON_TYPE}, or to "
            f"{YAML_TYPES[0]} for a recipe in mergekit's YAML (curl -H 'Content-Type: {YAML_TYPES[0]}')"
        )
    data, length = bytearray(), 0
    try:
        with fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= MAX_BODY_BYTES:
                    data += chunk
                elif length > DRAINED_BYTES:
                    break
    except TimeoutError as error:
        raise RequestTimeoutError(f"the body had not come to an end after {BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise MalformedRequestError("the client went away before the request was whole") from error
    if length > MAX_BODY_BYTES:
        raise RequestTooLargeError(f"the body is longer than {MAX_BODY_BYTES} bytes")
    return Body(bytes(data.removeprefix(codecs.BOM_UTF8)), kind in YAML_TYPES, query)


BodyDep = Annotated[Body, Depends(receive)]


def read(body: Body, settings: Settings, model: type[MergeRequest | PlanRequest]) -> Wanted:
    """Parse a body and check all that it says by itself; ``model`` is what its JSON has to be.

    :raises MalformedRequestError: it is not JSON or YAML in UTF-8, or the query speaks beside a JSON body.
    :raises RecipeError: it is no request, so there is nothing to look at; lists every problem.
    """
    if not body.is_yaml:
        request = _request(body, model)
        wanted = check(lambda: request.recipe, request.output, request.options, settings)
        if not isinstance(request, MergeRequest):
            return wanted
        webhook, problems = webhook_of(request.webhook, settings)
        problems = (*wanted.problems, *problems)
        return replace(wanted, webhook=webhook, priority=request.priority, problems=problems)
    text = _text(body.data)
    if body.query.priority is not None and model is not MergeRequest:
        raise MalformedRequestError("the query parameter priority is for jobs: a plan waits for nothing")
    wanted = check(lambda: load_yaml(text), body.query.output, body.query.options, settings)
    wanted = replace(wanted, priority=body.query.priority or 0)
    if body.query.output is None and model is MergeRequest:
        missing = "output: give the place of the checkpoint as the query parameter `output`"
        return replace(wanted, problems=(*wanted.problems, missing))
    return wanted


def check(recipe: Callable[[], Any], output: str | None, options: OptionsBody, settings: Settings) -> Wanted:
    """What is wanted, from the recipe's data as ``recipe`` loads it, and everything that is wrong with it."""
    problems: list[str] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except RecipeError as error:
            problems.extend(error.problems)
        except StoreError as error:
            problems.append(f"output: {error}")
        return None

    data = attempt(recipe)
    parsed = None if problems else attempt(lambda: parse_documents(data))
    left = None if parsed is not None else salvage(data)
    place = None if output is None else attempt(lambda: normalise(output))
    chosen = attempt(lambda: plan_options(settings, options)) or settings.default_options
    seen = parsed if left is None else graph_of(left)
    return Wanted(seen, place, chosen, tuple(problems))


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError(
            f"the body is not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start}): "
            "save the recipe as UTF-8"
        ) from error


def _hinted(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What is wrong with a JSON body, and what an unknown key may have meant."""
    found = validation_problems(error)
    for number, item in enumerate(error.errors(include_url=False)[:_MOST_PROBLEMS]):
        if item["type"] == "extra_forbidden":
            *parents, key = item["loc"]
            known = OptionsBody.model_fields if parents else model.model_fields
            found[number] = f"{found[number].rpartition(': ')[0]}: is not known{key_hint(key, known)}"
    return found


def _request(body: Body, model: type[MergeRequest | PlanRequest]) -> MergeRequest | PlanRequest:
    if ignored := [name for name, value in body.query if value is not None]:
        raise MalformedRequestError(
            f"the query parameters {', '.join(ignored)} go with a YAML body only: put them into the JSON body"
        )
    try:
        return model.model_validate_json(body.data)
    except ValidationError as error:
        found = _hinted(error, model)
        if any(item["type"] == "json_invalid" for item in error.errors(include_url=False)):
            raise MalformedRequestError("; ".join(found)) from error
        shown = found[:_MOST_PROBLEMS]
        more = len(found) - len(shown)
        raise RecipeError(*shown, *([f"and {more} more problem(s)"] if more else [])) from error
