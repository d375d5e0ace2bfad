"""Options of an optimizer: their type, range, meaning and source, checked once at the public door."""

from __future__ import annotations

import difflib
import math
import numbers
from ast import literal_eval
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Option:
    """One keyword argument of an optimizer.

    Args:
        name: the keyword.
        kind: `int`, `float`, `bool` or `str`.
        help: what it does, in a sentence.
        low, high: range of a number; `low_open` excludes the lower end, `high_open` the upper one.
        choices: allowed values of a `str`.
        optional: whether `None` is allowed.
        source: paper or section it comes from.
    """

    name: str
    kind: type
    help: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    source: str = ""

    @property
    def allowed(self) -> str:
        """The allowed values, for messages and help."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.kind is bool:
            text = "true or false"
        elif self.kind in (int, float):
            left = "(" if self.low_open or self.low == -math.inf else "["
            right = ")" if self.high_open or self.high == math.inf else "]"
            text = f"in {left}{self.low:g}, {self.high:g}{right}"
        else:
            text = f"a {self.kind.__name__}"
        return text + (" or none" if self.optional else "")

    def check(self, value: Any) -> Any:
        """The value in this option's type. Raises `TypeError` for a wrong kind, `ValueError` for a wrong value."""
        if value is None:
            if self.optional:
                return None
            raise TypeError(f"`{self.name}` must be {self.allowed}, got None.")
        if self.kind is str and isinstance(value, (torch.dtype, torch.device)):
            value = str(value).removeprefix("torch.")
        value = self._of_kind(value)
        if self.choices and value not in self.choices:
            raise ValueError(f"`{self.name}` must be {self.allowed}, got {value!r}.{closest(value, self.choices)}")
        if self.kind in (int, float) and not self._in_range(value):
            raise ValueError(f"`{self.name}` must be {self.allowed}, got {value}.")
        return value

    def _of_kind(self, value: Any) -> Any:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if self.kind is float and is_number:
            return float(value)
        if self.kind is int and is_number and float(value).is_integer():
            return int(value)  # pyright: ignore[reportArgumentType]
        if isinstance(value, self.kind) and self.kind in (bool, str):
            return value
        raise TypeError(f"`{self.name}` must be {self.allowed} ({self.kind.__name__}), got {value!r}.")

    def _in_range(self, value: float) -> bool:
        if math.isinf(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def parse(self, text: str) -> Any:
        """The value of a command-line word: `1e-3`, `true`, `none`, `bfloat16`."""
        word = text.strip()
        if self.optional and word.lower() in ("none", "null"):
            return self.check(None)
        if self.kind is bool and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if self.kind is str:
            return self.check(word.strip("'\""))
        try:
            value = literal_eval(word)
        except (ValueError, SyntaxError):
            value = word
        return self.check(value)


SHARD_STATE = Option(
    "shard_state",
    bool,
    "whether each rank keeps a part of the state; none: where there are several",
    optional=True,
    source="ZeRO, arXiv 1910.02054",
)


def closest(name: str, names: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing where no name is near."""
    match = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean `{match[0]}`?" if match else ""


def check_options(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value checked by its option. Every option must have a value and every value an option."""
    return {option.name: option.check(values[option.name]) for option in options}


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` that names the first unknown option, its closest match and the whole list."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{owner} has no option `{name}`.{closest(name, known)} Its options are: {', '.join(sorted(known))}."
            )
