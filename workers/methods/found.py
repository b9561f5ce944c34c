"""Merge methods from outside the tree, by the entry points that installed distributions name.

They are read by every process that merges or plans, so a distribution has to be installed wherever either happens:
where the API and the scheduler run, and on every worker. How to write one: ``docs/add-a-method.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from importlib.metadata import EntryPoint, entry_points

from workers.methods.base import Method

GROUP = "mergemill.methods"
"""The entry-point group; each of its names is a method's own."""

log = logging.getLogger(__name__)


def found_outside(taken: Container[str]) -> dict[str, Method]:
    """The methods of installed distributions, by name.

    One that cannot be loaded, is no method, is called otherwise than it says, or has a name that is ``taken`` is left
    out, and the log says why: it takes no other method with it.
    """
    found: dict[str, Method] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        method = _loaded(entry)
        if method is None:
            continue
        if method.name in taken or method.name in found:
            log.error("the method of %s is left out: there is a %r already", entry.value, method.name)
        else:
            found[method.name] = method
    return found


def _loaded(entry: EntryPoint) -> Method | None:
    try:
        method = entry.load()
    except Exception:
        log.exception("the method of %s cannot be loaded and is left out", entry.value)
        return None
    if not isinstance(method, Method) or method.name != entry.name:
        log.error("the method of %s is left out: it is no Method called %r", entry.value, entry.name)
        return None
    return method
