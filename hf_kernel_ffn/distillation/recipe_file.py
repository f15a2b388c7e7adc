"""Reading a recipe from a YAML file, with overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..checkpoint_code.errors import InputError
from .recipe import Recipe

MOST_CHARACTERS = 200_000
"""Of a recipe's file; more is no recipe."""
MOST_VALUES = 20_000
"""In a recipe, aliases followed: a few lines of aliases to aliases can stand for billions."""


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML ``file`` with ``dotted.key=value`` overrides, values read as YAML.

    Raises:
        InputError: the file or an override cannot be read, or a key or type is wrong; it is named.
    """
    content = _read_mapping(file)
    for override in overrides or []:
        _apply_override(content, override)
    try:
        recipe = Recipe(**content)
        recipe.kernel_settings()
    except ValidationError as error:
        raise InputError(f"{file}: {_describe_first_error(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: kernel_ffn: {error}") from error
    return recipe


def _read_mapping(file: str | Path) -> dict[str, Any]:
    try:
        content = _parse_yaml(Path(file).read_text(encoding="utf-8"))
    # PyYAML lets others than its own errors through.
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"found {file} unreadable as YAML ({' '.join(str(error).split())}), expected a recipe"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"found {type(content).__name__} in {file}, expected a mapping of recipe keys"
        )
    return content


def _parse_yaml(text: str) -> Any:
    """What ``text`` says; ValueError if it is too much for a recipe."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, expected at most {MOST_CHARACTERS:,}")
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    count = 0
    while waiting:
        count += 1
        if count > MOST_VALUES:
            raise ValueError("aliases that stand for too many values")
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            waiting += [key_or_value for pair in node.value for key_or_value in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return yaml.safe_load(text)


def _describe_first_error(error: ValidationError) -> str:
    """Where the first of pydantic's errors is, what it is, and what was found there."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the recipe"
    message = first["msg"].removeprefix("Value error, ")
    says_what_was_found = first["type"] in ("missing", "value_error")
    found = "" if says_what_was_found else f", found {first['input']!r}"
    return f"{where}: {message}{found}"


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set in ``content`` what ``dotted.key=value`` says; mappings on the way are made."""
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise InputError(f"found {override!r}, expected dotted.key=value")
    try:
        parsed = _parse_yaml(value)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"found {value!r} for {dotted}, expected a YAML value") from error

    target: Any = content
    for depth in range(len(keys) - 1):
        index = _index_into(target, keys, depth)
        if isinstance(target, dict) and not isinstance(target.get(index), (dict, list)):
            target[index] = {}
        target = target[index]
    target[_index_into(target, keys, len(keys) - 1)] = parsed


def _index_into(target: object, keys: list[str], depth: int) -> str | int:
    """What the key at ``depth`` of ``keys`` picks in ``target``; InputError if it picks nothing."""
    key = keys[depth]
    dotted = ".".join(keys)
    above = ".".join(keys[:depth])
    if isinstance(target, dict):
        return key
    if not isinstance(target, list):
        raise InputError(f"found {dotted!r}, but {above!r} holds no keys")
    if not key.isdigit() or int(key) >= len(target):
        raise InputError(f"found {dotted!r}, expected a number below {len(target)} after {above!r}")
    return int(key)
