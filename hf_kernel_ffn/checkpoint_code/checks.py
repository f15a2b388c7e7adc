"""Checks of values that come from a user or from config.json; each raises one InputError.

This file travels inside converted checkpoints: it imports the standard library alone.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from .errors import InputError

DAMAGED = "config.json is damaged"
"""What a message about a value that only this package writes ends with."""
MODULE_PATH = re.compile(r"(?!.*__)\w+(\.\w+)*")
"""A dotted path that may be looked up as attributes of a model: no name has two underscores."""
LARGEST_SIZE = 2**31
"""Sizes stay below this; torch would ask for more memory than there is."""


def reject_unknown_fields(dataclass: type, entry: dict, what: str) -> None:
    """InputError, with the nearest right name, if ``entry`` has a key that is no field."""
    reject_unknown_keys([field.name for field in fields(dataclass)], entry, what)


def reject_unknown_keys(names: Collection[str], entry: Iterable[str], what: str) -> None:
    """InputError, with the nearest right name, if ``entry`` has a key that is not in ``names``."""
    for key in entry:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}"
            raise InputError(f"found unknown key {key!r} in the {what}: {hint}")


def require_mapping(what: str, value: object) -> dict[str, Any]:
    """``value``; InputError unless it is a dict."""
    if not isinstance(value, dict):
        raise InputError(
            f"found {type(value).__name__} as the {what}, expected a mapping: {DAMAGED}"
        )
    return value


def require_one_of(name: str, value: object, choices: Collection[str]) -> None:
    """InputError unless ``value`` is one of the names ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"found {name}={value!r}, expected one of {', '.join(choices)}")


def require_number(
    name: str, value: object, expected: str, *, least: float = -math.inf, most: float = math.inf
) -> None:
    """InputError, saying what is ``expected``, unless ``value`` is from ``least`` to ``most``."""
    if not _is_number(value) or not least <= value <= most:  # type: ignore[operator]
        raise InputError(f"found {name}={value!r}, expected {expected}")


def require_positive_number(name: str, value: object, expected: str) -> None:
    """InputError, saying what is ``expected``, unless ``value`` is positive and finite."""
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
        raise InputError(f"found {name}={value!r}, expected {expected}")


def require_size(name: str, value: object) -> None:
    """InputError unless ``value`` is a positive integer that can be a size."""
    if not _is_integer(value) or not 0 < value < LARGEST_SIZE:  # type: ignore[operator]
        raise InputError(
            f"found {name}={value!r} in the kernel_ffn entry, "
            f"expected a positive integer: {DAMAGED}"
        )


def require_count(name: str, value: object) -> None:
    """InputError unless ``value`` is an integer from 0 on."""
    if not _is_integer(value) or not 0 <= value < LARGEST_SIZE:  # type: ignore[operator]
        raise InputError(
            f"found {name}={value!r} in the kernel_ffn entry, "
            f"expected an integer from 0 on: {DAMAGED}"
        )


def require_module_path(what: str, path: object) -> None:
    """InputError unless ``path`` is a dotted path that may be looked up in a model."""
    if not isinstance(path, str) or not MODULE_PATH.fullmatch(path):
        raise InputError(f"found {path!r} in the {what}, expected the path of an FFN: {DAMAGED}")


def is_positive_integer(value: object) -> bool:
    """Whether ``value`` is an integer, no bool, and at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
