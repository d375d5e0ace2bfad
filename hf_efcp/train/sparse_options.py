"""What a user says about sparse training: in arguments, in code, or before an unmodified script."""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_efcp.optim.options import closest, refuse_unknown
from hf_efcp.sparsity import CorrectionOptions, sparse_method
from hf_efcp.sparsity.sparsifier import INITIAL

CORRECTIONS = ("none", "agent")
_MASKING = ("initial", "include", "exclude", "densities")  # of the masks, not of the rule that changes them
_launched: dict[str, Any] = {}


@dataclass(frozen=True)
class SparseOptions:
    """Checked options of sparse training.

    Args:
        sparsity: share of the masked weights that is 0, in [0, 1); `None` for a dense model.
        sparse_method: a name of `hf_efcp.sparsity.METHODS`; `rigl` where there is a sparsity.
        sparse_args: settings of it (`SparseMethod`) and of the masks (`Sparsifier`).
        gradient_correction: `none` or `agent`.
        correction_args: see `CorrectionOptions`.
        adversary: `fgsm` or `pgd`, with options after a colon; see `hf_efcp.train.adversary`.

    Raises:
        ValueError, TypeError: what is unknown, out of range, or without effect.
    """

    sparsity: float | None = None
    sparse_method: str | None = None
    sparse_args: dict[str, Any] | str | None = None
    gradient_correction: str | None = None
    correction_args: dict[str, Any] | str | None = None
    adversary: str | None = None
    settings: dict[str, Any] = field(init=False, repr=False)
    correction: CorrectionOptions | None = field(init=False, repr=False)

    def __post_init__(self):
        settings = parse_settings(self.sparse_args, "sparse_args")
        if self.sparsity is None and (self.sparse_method is not None or settings):
            raise ValueError("`sparse_method` and `sparse_args` need `sparsity`, the share of weights that is 0.")
        is_number = isinstance(self.sparsity, (int, float)) and not isinstance(self.sparsity, bool)
        if self.sparsity is not None and not (is_number and 0 <= self.sparsity < 1):
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity!r}.")
        if self.sparsity is not None:
            method = {name: value for name, value in settings.items() if name not in _MASKING}
            sparse_method(self.method, **method)
            if settings.get("initial", "random") not in INITIAL:
                raise ValueError(f"`initial` must be one of {', '.join(INITIAL)}, got {settings['initial']!r}.")
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "correction", self._correction())

    @property
    def method(self) -> str:
        """The rule, `rigl` unless another is named."""
        return self.sparse_method or "rigl"

    def _correction(self) -> CorrectionOptions | None:
        kind = self.gradient_correction or "none"
        if kind not in CORRECTIONS:
            allowed = ", ".join(CORRECTIONS)
            hint = closest(kind, CORRECTIONS)
            raise ValueError(f"`gradient_correction` must be one of {allowed}, got {kind!r}.{hint}")
        given = parse_settings(self.correction_args, "correction_args")
        if kind == "none":
            if given:
                raise ValueError("`correction_args` need `gradient_correction=agent`.")
            return None
        refuse_unknown("agent", given, [option.name for option in fields(CorrectionOptions)])
        if isinstance(given.get("clip"), list):
            given["clip"] = tuple(given["clip"])
        return CorrectionOptions(**given)


def parse_settings(given: Mapping[str, Any] | str | None, option: str) -> dict[str, Any]:
    """Settings from a dict, a JSON object, or `name=value,name=value`.

    Raises:
        ValueError: text that is neither.
    """
    if given is None or given == "":
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if given.lstrip().startswith("{"):
        try:
            return json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{option}` starts like JSON and is not: {error} in {given!r}.") from None
    settings = {}
    for item in given.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise ValueError(f"`{option}` is name=value,name=value or a JSON object; `{item}` in {given!r} is not.")
        settings[name] = _value(value)
    return settings


def _value(word: str) -> Any:
    plain = {"true": True, "false": False, "none": None}
    if word.lower() in plain:
        return plain[word.lower()]
    try:
        return literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def train_sparsely(**options: Any) -> None:
    """Options for every `EfcpTrainer` made from now on whose arguments have none; without any, none.

    Raises:
        ValueError, TypeError: as `SparseOptions`.
    """
    SparseOptions(**options)
    _launched.clear()
    _launched.update(options)


def sparse_options(args: TrainingArguments, *, has_adversary: bool = False) -> SparseOptions | None:
    """The options of a run, from its arguments or else from the launcher; `None` where it is an ordinary one."""
    names = [option.name for option in fields(SparseOptions) if option.init]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    options = SparseOptions(**(given or _launched))
    is_used = options.sparsity is not None or options.correction is not None or options.adversary or has_adversary
    return options if is_used else None
