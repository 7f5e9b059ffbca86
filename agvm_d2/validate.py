"""Checks of a user's values, whose messages name the key."""

from __future__ import annotations
import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

INSTALL_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


def is_int(value: Any) -> bool:
    """A whole number; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(*values: Any) -> bool:
    """Whole numbers or floats."""
    return all(is_int(v) or isinstance(v, float) for v in values)


def require(ok: bool, key: str, value: Any, need: str) -> None:
    """Unless `ok`, ValueError with the key, what was found and what it must be."""
    if not ok:
        raise ValueError(f"{key}: found {value!r}, but it must {need}.")


def one_of(key: str, value: Any, allowed: Collection[str]) -> None:
    """`require` that `value` is one of the names in `allowed`."""
    require(value in tuple(allowed), key, value, f"be one of {', '.join(allowed)}")


def holds(condition: Callable[[Any], Any], value: Any) -> bool:
    """`condition(value)`; False for a value of a type that it cannot take."""
    try:
        return bool(condition(value))
    except TypeError:
        return False


def message(error: BaseException) -> str:
    """What an exception says; a KeyError would put it in quotes."""
    return str(error.args[0] if len(error.args) == 1 else error)


def nested_keys(values: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Of a config, also those of groups.

    >>> list(nested_keys({"train": {"seed": 1}}))
    ['train', 'train.seed']
    """
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from nested_keys(value, f"{prefix}{name}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `name`: which of `known` look like it, if any.

    >>> did_you_mean("agvm.start_itr", ["agvm.start_iter", "train.device"])
    '; did you mean agvm.start_iter?'
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else "."
