"""Where the models are that a recipe names, and that no output lies over them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from workers.errors import PlanError, StoreError
from workers.store.uris import from_path, join, normalise, to_path

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether a model's name in a recipe is a hub's, such as ``org/name@revision``, not a place."""
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not name.startswith(".")
        and ".." not in re.split("[/@]", name)
    )


def resolve_model(name: str, model_roots: Mapping[str, str]) -> str:
    """Where a model named in a recipe is: a normalised URI.

    ``model_roots`` maps a hub name, or a prefix of hub names ending in ``/`` (``""`` for all), to a URI prefix;
    the longest match wins. A revision is appended as ``@revision``.

    :raises PlanError: a relative path, or a hub name that nothing maps.
    """
    if name.startswith(("s3://", "file://", "/")):
        try:
            return normalise(name)
        except StoreError as error:
            raise PlanError(f"{name}: {error}") from error
    if not is_hub_name(name):
        raise PlanError(
            f"{name!r} is neither s3://bucket/prefix, file:///directory, an absolute path nor a hub name "
            "(a relative path would mean the server's disk)"
        )
    bare, _, revision = name.partition("@")
    prefixes = [root for root in model_roots if (root.endswith("/") or not root) and bare.startswith(root)]
    key = next((key for key in (name, bare) if key in model_roots), max(prefixes, key=len, default=None))
    if key is None:
        raise PlanError(
            f"{name!r} is a hub name that this service does not know, and nothing is downloaded from hubs: name "
            "the place of its files, or have the service find it there, for example with "
            f'MERGEMILL_MODEL_ROOTS=\'{{"{bare}": "s3://bucket/{bare}"}}\''
        )
    try:
        root = normalise(model_roots[key])
        if key == name:
            return root
        if key == bare:
            return f"{root}@{quote(revision) if root.startswith('file:') else revision}"
        return join(root, *name[len(key) :].split("/"))
    except StoreError as error:
        raise PlanError(f"{name}: MERGEMILL_MODEL_ROOTS maps {key!r} to no place: {error}") from error


def overlap(output: str, inputs: Iterable[str]) -> list[str]:
    """What is wrong with an output that equals, lies inside or contains an input."""
    problems = []
    ours = _real(output)
    for uri in dict.fromkeys(inputs):
        theirs = _real(uri)
        if theirs == ours or ours.startswith(theirs + "/") or theirs.startswith(ours + "/"):
            problems.append(f"output {output} overlaps the input {uri}: choose another place")
    return problems


def _real(uri: str) -> str:
    """The place itself, without the symbolic links that may lead to it."""
    return from_path(os.path.realpath(to_path(uri))) if uri.startswith("file:") else uri
