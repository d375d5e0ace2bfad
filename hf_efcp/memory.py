"""What training a model with an optimizer will hold in memory, counted on the meta device: nothing is allocated."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.optim.budget import PICKED
from hf_efcp.optim.registry import OptimizerSpec, create_optimizer, get_spec
from hf_efcp.parallel import planned

_NOT_COUNTED = "Not counted: activations, and what a step needs while it runs."


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and its optimizer between two steps.

    Attributes:
        n_parameters: all numbers of the model, each tied weight once.
        n_trained: those with a gradient.
        weights: parameters and buffers.
        gradients: one for each trained parameter, in its dtype.
        state: what the optimizer keeps on this process.
        adamw: the two moments of `adamw_torch`, in the parameters' dtypes.
        settings: options of the optimizer that differ from its name's defaults, and all that `memory_budget` picked.
    """

    n_parameters: int
    n_trained: int
    weights: int
    gradients: int
    state: int
    adamw: int
    settings: Mapping[str, Any]


def footprint(
    model: nn.Module, name: str, options: Mapping[str, Any], *, device: str = "cpu", world_size: int = 1
) -> Footprint:
    """Count what `model` and the optimizer `name` take.

    Args:
        model: on the meta device.
        name: a registered optimizer.
        options: as on a command line or in code.
        device: `"cpu"` or `"cuda"`, where training will run: some state is worth keeping on one of them alone.
        world_size: processes of DDP; counted is the first of them.

    Raises:
        ValueError, TypeError: a name or option that does not exist or fit; nothing to train; an optimizer that cannot
            tell its state before the first step.
    """
    spec = get_spec(name)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that is trained.")
    elsewhere = spec.resolve(options).get("state_device")
    # A real device would get real tensors; the learning rate, which published commands give, changes no bytes.
    options = {option: value for option, value in options.items() if option not in ("state_device", "lr")}
    home = elsewhere or device
    with planned(world_size):
        optimizer = create_optimizer(name, model, lr=1e-3, **options)
        state = _state_bytes(optimizer, name, on_cpu=home == "cpu")
    settings = _settings(spec, optimizer) | ({"state_device": elsewhere} if elsewhere else {})
    return Footprint(
        n_parameters=sum(p.numel() for p in parameters),
        n_trained=sum(p.numel() for p in trained),
        weights=sum(_bytes(t) for t in [*parameters, *model.buffers()]),
        gradients=sum(map(_bytes, trained)),
        state=state,
        adamw=2 * sum(map(_bytes, trained)),
        settings=settings,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _settings(spec: OptimizerSpec, optimizer: Optimizer) -> dict[str, Any]:
    picked = PICKED if optimizer.defaults.get("memory_budget") is not None else ()
    usual = {option: default for option, (_, default) in spec.options().items() if option in optimizer.defaults}
    return {o: optimizer.defaults[o] for o in usual if o in picked or optimizer.defaults[o] != usual[o]}


def _state_bytes(optimizer: Optimizer, name: str, *, on_cpu: bool) -> int:
    try:
        if not isinstance(optimizer, EfcpOptimizer):
            raise NotImplementedError
        optimizer.materialize_state()
    except NotImplementedError:
        raise ValueError(
            f"`{name}` makes its state at its first step, from what passes through the layers; it cannot be counted "
            "without one. After a step, `optimizer.state_bytes()` says what it was."
        ) from None
    if not on_cpu:
        for state in optimizer.state.values():
            for key in optimizer.cpu_state:
                state.pop(key, None)
    return optimizer.state_bytes()


# ------------------------------------------------------------------------- models


def meta_model(source: str, *, model_class: str | None = None, dtype: str | None = None) -> tuple[nn.Module, str]:
    """The model of a config on the meta device, and in words where the config is from.

    Args:
        source: Hub id, local folder, `config.json`, or a model type of transformers, which means its default config.
        model_class: a class of transformers; by default the one in the config's `architectures`.
        dtype: of the weights; by default the config's, else float32.

    Raises:
        ValueError: no such config or class, or one that needs code which is not part of transformers.
    """
    import transformers

    config, origin = _config(source)
    name = model_class or (getattr(config, "architectures", None) or [None])[0]
    if name is not None and not hasattr(transformers, name):
        whose = "asked for by `--model_class`" if model_class else "named by the config; give one with `--model_class`"
        raise ValueError(f"transformers {transformers.__version__} has no class `{name}`, {whose}.")
    chosen = str(dtype or getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config) if name is None else getattr(transformers, name)(config)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        what = name or "AutoModel"
        raise ValueError(f"{what} cannot be built from the config of `{source}`: {_line(error)}") from error
    return model.to(getattr(torch, chosen)), origin


def _config(source: str) -> tuple[Any, str]:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"`{source}` is a folder without config.json.")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False), f"config of {source}"
    except (OSError, ValueError, KeyError) as error:
        if source in CONFIG_MAPPING:
            return AutoConfig.for_model(source), f"default config of the model type {source}"
        if path.exists() or not isinstance(error, OSError):
            raise ValueError(f"The config of `{source}` cannot be read: {_line(error)}") from error
        raise ValueError(
            f"`{source}` is no local folder and no model type, and the Hub gave no config for it: {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    """An error's message as one line of a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


# --------------------------------------------------------------------------- text


def memory_text(
    source: str | None,
    name: str,
    options: Mapping[str, Any],
    *,
    model_class: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    world_size: int | Sequence[int] = 1,
) -> str:
    """The table that `hf-efcp memory` prints.

    Args:
        world_size: one number of processes, or several to plan with.

    Raises:
        ValueError, TypeError: as `meta_model` and `footprint`.
    """
    if source is None:
        raise ValueError("There is no model to count: give a Hub id, local folder, config.json or model type.")
    sizes = [world_size] if isinstance(world_size, int) else list(world_size)
    if min(sizes) < 1:
        raise ValueError(f"`world_size` must be at least 1, got {min(sizes)}.")
    spec = get_spec(name)
    spec.resolve(options)  # a wrong option is told before any model is looked for
    model, origin = meta_model(source, model_class=model_class, dtype=dtype)
    counts = {size: footprint(model, name, options, device=device, world_size=size) for size in sizes}
    count = counts[sizes[0]]
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    head = f"{type(model).__name__}, {count.n_parameters:,} parameters, {dtypes} ({origin})"
    frozen = count.n_parameters - count.n_trained
    settings = ", ".join(f"{option}={value}" for option, value in count.settings.items())
    notes = [f"{name}: {settings or 'default options'}."]
    if frozen:
        notes.append(f"{frozen:,} parameters are frozen; bytes are per parameter that is trained.")
    if max(sizes) > 1:
        number = sizes[0] if len(sizes) == 1 else "so many"
        notes.append(
            f"Bytes are those of the first of {number} processes of DDP. Each has all weights and gradients and a "
            f"part of the state of {name} (shard_state). FSDP2 divides weights and gradients too."
        )
    lines = [line for note in (*notes, _NOT_COUNTED) for line in textwrap.wrap(note, 100, break_long_words=False)]
    return "\n".join([head, "", *_table(name, counts), "", *lines])


def _table(name: str, counts: Mapping[int, Footprint]) -> list[str]:
    count = next(iter(counts.values()))
    rows = [("weights", count.weights), ("gradients", count.gradients)]
    for size, of_size in counts.items():
        rows.append((name if len(counts) == 1 else f"{name} of {size}", of_size.state))
    rows.append(("adamw_torch", count.adamw))
    cells = [("", "bytes per parameter", "bytes")]
    cells += [(label, f"{size / count.n_trained:.2f}", f"{size:,}") for label, size in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *others = widths
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]) for row in cells
    ]
