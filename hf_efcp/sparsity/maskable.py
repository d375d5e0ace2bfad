"""Which tensors of a model are made sparse."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_NAMED_OTHERWISE = re.compile(r"embed|position|token|bias|norm", re.IGNORECASE)


@dataclass(frozen=True)
class Maskable:
    """A parameter to be masked.

    Attributes:
        name: as `named_parameters` gives it; the first of a tied tensor's names.
        parameter: the tensor.
        shape: of one kernel; a tensor of experts, (experts, out, in), holds several of shape (out, in).
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.parameter.numel()

    @property
    def copies(self) -> int:
        """Number of kernels in the tensor."""
        return self.size // math.prod(self.shape)


def maskable_parameters(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> list[Maskable]:
    """The parameters that sparse training masks, in the model's order, tied ones once, frozen ones never.

    By default the weights of linear layers, convolutions, transformers' `Conv1D`, attention of torch, and
    three-dimensional tensors of experts; without biases, norms, embeddings, what is tied to an embedding, and the
    output embedding of a language model.

    Args:
        model: any module.
        include: regular expressions; parameters of two dimensions or more whose name one of them is found in, instead
            of the default.
        exclude: regular expressions of names to leave dense.

    Raises:
        ValueError: a pattern that no name matches, or nothing left to mask.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if include is None:
        chosen = _usual(model, parameters)
    else:
        matrices = {name: p for name, p in parameters.items() if p.ndim >= 2}
        chosen = _matching(include, matrices, "include")
    dropped = _matching(exclude, parameters, "exclude") if exclude is not None else set()
    experts = _experts(model)
    found = [
        Maskable(name, p, tuple(p.shape[-2:]) if id(p) in experts else tuple(p.shape))
        for name, p in parameters.items()
        if name in chosen and name not in dropped
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter to mask; `include` takes patterns of their names.")
    return found


def entries_of(optimizer: Any, parameter: Tensor, mask: Tensor) -> Tensor:
    """The part of the mask whose state this rank has: all, unless an optimizer of several ranks divides it."""
    while not hasattr(optimizer, "own_entries") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.own_entries(parameter, mask) if hasattr(optimizer, "own_entries") else mask


def compiled(pattern: Any, option: str) -> re.Pattern[str]:
    """A regular expression that an option holds. Raises `TypeError` and `ValueError` that name the option."""
    if not isinstance(pattern, str):
        raise TypeError(f"`{option}` must be a regular expression or several, got {pattern!r}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{option}`: {pattern!r} is no regular expression: {error}.") from None


def _usual(model: nn.Module, parameters: dict[str, nn.Parameter]) -> set[str]:
    weights = {id(p) for module in model.modules() for p in _weights(module)} | _experts(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    if head is not None:
        embeddings.update(id(p) for p in head.parameters())
    return {name for name, p in parameters.items() if id(p) in weights - embeddings}


def _weights(module: nn.Module) -> Iterable[Tensor]:
    # transformers' Conv1D is a linear layer with its weight transposed; torch alone cannot import it.
    if isinstance(module, _MATRICES) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    return []


def _experts(model: nn.Module) -> set[int]:
    """Ids of (experts, out, in) tensors, which modules of mixtures hold themselves."""
    return {
        id(p)
        for module in model.modules()
        if not isinstance(module, (*_MATRICES, nn.Embedding))
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1 and not _NAMED_OTHERWISE.search(name)
    }


def _matching(patterns: str | Iterable[str], names: Iterable[str], option: str) -> set[str]:
    names, found = list(names), set()
    if not isinstance(patterns, Iterable):
        raise TypeError(f"`{option}` must be a regular expression or several, got {patterns!r}.")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = compiled(pattern, option)
        hits = {name for name in names if regex.search(name)}
        if not hits:
            raise ValueError(
                f"`{option}`: no parameter's name matches {pattern!r}; there are {', '.join(names[:6])}, …."
            )
        found |= hits
    return found
