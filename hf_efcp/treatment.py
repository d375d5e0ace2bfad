"""Which parameter of a model an optimizer treats how, and why: told on the meta device, where nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_efcp.memory import meta_model
from hf_efcp.optim.registry import create_optimizer, get_spec, list_optimizers


def treatment_text(
    source: str, name: str, options: Mapping[str, Any], *, model_class: str | None = None, dtype: str | None = None
) -> str:
    """The table that `hf-efcp explain NAME --model MODEL` prints.

    Raises:
        ValueError, TypeError: a name, option or model that does not exist or fit; an optimizer that treats all
            parameters alike.
    """
    spec = get_spec(name)
    spec.resolve(options)  # a wrong option is told before any model is looked for
    if not hasattr(spec.cls, "explain_parameters"):
        others = [other for other in list_optimizers() if hasattr(get_spec(other).cls, "explain_parameters")]
        raise ValueError(f"`{name}` treats all parameters alike; `--model` tells them apart for {', '.join(others)}.")
    model, origin = meta_model(source, model_class=model_class, dtype=dtype)
    optimizer: Any = create_optimizer(name, model, lr=1e-3, **options)
    told = optimizer.explain_parameters()
    count = sum(p.numel() for p in model.parameters())
    head = f"{type(model).__name__}, {count:,} parameters ({origin})"
    return "\n".join([head, "", *_totals(model, told), "", *_rows(model, told)])


def _totals(model: nn.Module, told: Mapping[str, str]) -> list[str]:
    """One line for each kind of treatment, the word before the colon."""
    kinds: dict[str, list[int]] = {}
    for name, treatment in told.items():
        kinds.setdefault(treatment.partition(":")[0], []).append(model.get_parameter(name).numel())
    return [f"{kind}: {sum(sizes):,} numbers in {len(sizes)} parameters" for kind, sizes in sorted(kinds.items())]


def _rows(model: nn.Module, told: Mapping[str, str]) -> list[str]:
    cells = [
        (name, "×".join(map(str, model.get_parameter(name).shape)) or "1", treatment)
        for name, treatment in told.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [f"{name.ljust(widths[0])}  {shape.rjust(widths[1])}  {treatment}" for name, shape, treatment in cells]
