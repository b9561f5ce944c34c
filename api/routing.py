"""GET, and HEAD with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

F = TypeVar("F", bound=Callable[..., Any])


def readable(router: APIRouter, path: str, **options: Any) -> Callable[[F], F]:
    """Route GET to the decorated function, and HEAD (RFC 9110, 9.3.2), which FastAPI leaves to its users."""

    def decorate(endpoint: F) -> F:
        router.head(path, **{**options, "include_in_schema": False})(endpoint)
        return router.get(path, **options)(endpoint)

    return decorate
