"""`--optim_args` as text: `name=value,name=value`, or a JSON object as the published M-FAC model cards print it."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, str]:
    """Options and their values, as words.

    Accepts all that transformers' own parser accepts, with the same result, and besides JSON objects, and dicts or how
    Python prints them: Trainer's search for hyper-parameters sets `optim_args` to what a trial gives, or to its `str`.

    Raises:
        ValueError: an item that is not `name=value`, a name given twice, or JSON that is not a flat object.
    """
    if isinstance(text, Mapping):
        text = format_optim_args(text)
    if not text or not text.strip():
        return {}
    pairs = _json_pairs(text) if text.lstrip().startswith("{") else [_pair(item, text) for item in text.split(",")]
    options: dict[str, str] = {}
    for name, value in pairs:
        if name in options:
            raise ValueError(f"`optim_args` gives `{name}` twice: {text!r}.")
        options[name] = value
    return options


def format_optim_args(options: Mapping[str, Any]) -> str:
    """The text that `parse_optim_args` reads as these options."""
    words = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }
    return json.dumps(words)


def _pair(item: str, text: str) -> tuple[str, str]:
    name, _, value = (part.replace(" ", "") for part in item.partition("="))
    if not name and not value:
        raise ValueError(f"`optim_args` has an empty item; remove the surplus comma in {text!r}.")
    if not name or not value:
        raise ValueError(
            f"`optim_args` is name=value,name=value or a JSON object; `{item.strip()}` in {text!r} is not."
        )
    if "=" in value:
        raise ValueError(
            f"`optim_args` has more than one '=' in `{item.strip()}`; separate options by commas: {text!r}."
        )
    return name, value


def _json_pairs(text: str) -> list[tuple[str, str]]:
    try:
        # Pairs instead of a dict: a dict would drop the first of two equal names in silence.
        pairs = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError):
            return _json_pairs(format_optim_args(ast.literal_eval(text)))
        raise ValueError(f"`optim_args` starts like JSON and is not: {error} in {text!r}.") from None
    for name, value in pairs:
        if isinstance(value, list):
            raise ValueError(f"`optim_args` must be a flat JSON object; `{name}` holds {json.dumps(value)}.")
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in pairs]
