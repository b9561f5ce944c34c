"""YAML from strangers, read safely: plain data only, bounded work, no key twice. Pure.

Reference: YAML 1.1 as PyYAML's safe loader reads it, which is what mergekit's recipes are written for.
"""

from __future__ import annotations

from typing import Any

import yaml

from workers.errors import RecipeError

MAX_MERGED_KEYS = 10_000
"""Most keys that merge keys (``<<``) may bring in: nested ones multiply, and ten lines can ask for billions."""

MAX_DEPTH = 50
"""Deepest nesting: the compiled loader recurses, and would end the process instead of raising."""

_MERGE = "tag:yaml.org,2002:merge"
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_documents(text: str) -> list[Any]:
    """The documents of a YAML text as plain data.

    :raises RecipeError: it is not YAML, names Python objects, has a key twice, or asks for too much.
    """
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            documents = []
            while loader.check_node():
                if (node := loader.get_node()) is None:
                    break
                _check(node)
                documents.append(loader.construct_document(node))
            return documents
        finally:
            loader.dispose()
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(f"the recipe is not valid YAML: {error}") from error
    except (LookupError, AttributeError) as error:  # PyYAML's, of `!!int ''`, `!!bool x` and `!!timestamp x`
        raise RecipeError("the recipe is not valid YAML: a value does not suit its `!!` tag") from error


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(f"the recipe is nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check(root: yaml.Node) -> None:
    """Refuse what the loader would take in silence, or would take for ever."""
    seen: set[int] = set()
    stack = [root]
    merged = 0
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                stack += [key, value]
                if key.tag == _MERGE:
                    merged += _merged_keys(value)
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        where = key.start_mark.line + 1
                        raise RecipeError(f"line {where}: the key `{key.value[:100]}` is given twice")
                    keys.add((key.tag, key.value))
            if merged > MAX_MERGED_KEYS:
                raise RecipeError(f"merge keys (`<<`) bring in more than {MAX_MERGED_KEYS} keys")


def _merged_keys(value: yaml.Node) -> int:
    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for source in sources:
        if isinstance(source, yaml.MappingNode) and any(key.tag == _MERGE for key, _ in source.value):
            raise RecipeError("a mapping that is merged in by `<<` may not use `<<` itself")
    return sum(len(source.value) + 1 for source in sources)
