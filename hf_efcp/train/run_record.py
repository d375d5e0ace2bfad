"""What a training run was, read from its optimizer, log history and process: the facts of a model card."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from hf_efcp.curvature.layout import fitting_block_size
from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.optim.registry import OptimizerSpec, get_spec, list_optimizers

_BOOKKEEPING = ("_runtime", "_per_second", "_time", "_flos")  # evaluation entries that are no metrics
_SECRET_FLAG = re.compile(r"^--(\w*(hub|auth|access|api|hf)[-_])?(token|key|secret|password)$")
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")
_REDACTED = "$HF_TOKEN"


@dataclass(frozen=True)
class OptimizerRecord:
    """An optimizer after training.

    Attributes:
        name: its registered name, or its class's.
        paper: empty where none is known.
        options: those that differ from this name's defaults; learning rate and weight decay are the Trainer's.
        n_parameters: numbers that it trains.
        state_bytes: all its tensors that live between steps, 0 before the first step.
        adamw_bytes: AdamW's two moments, which have the parameters' dtypes.
    """

    name: str
    paper: str
    options: Mapping[str, Any]
    n_parameters: int
    state_bytes: int
    adamw_bytes: int

    @classmethod
    def of(cls, optimizer: Optimizer, name: str) -> OptimizerRecord:
        """Measure `optimizer`, which was asked for as `name`; accelerate's wrappers are seen through."""
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        spec = registered_spec(optimizer, name)
        if spec is None:
            signature = inspect.signature(type(optimizer).__init__).parameters
            usual = {option: parameter.default for option, parameter in signature.items()}
        else:
            usual = {option: default for option, (_, default) in spec.options().items()}
        settings = {o: v for o, v in optimizer.defaults.items() if o in usual and o not in ("lr", "weight_decay")}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if spec and usual.get("block_size", 0) is None and "density" in usual:  # the model's own choice is no change
            usual["block_size"] = fitting_block_size([p.numel() for p in parameters])
        return cls(
            name=spec.name if spec else type(optimizer).__name__,
            paper=spec.paper if spec else "",
            options={option: value for option, value in settings.items() if value != usual[option]},
            n_parameters=sum(p.numel() for p in parameters),
            state_bytes=_state_bytes(optimizer),
            adamw_bytes=sum(2 * p.numel() * p.element_size() for p in parameters),
        )


def registered_spec(optimizer: Optimizer, name: str) -> OptimizerSpec | None:
    """The registered optimizer asked for, or the first whose class and fixed options are those of `optimizer`."""
    names = list_optimizers()
    for spec in map(get_spec, sorted(names, key=lambda candidate: candidate != name)):
        if type(optimizer) is spec.cls and all(optimizer.defaults.get(o) == v for o, v in spec.fixed.items()):
            return spec
    return None


def _state_bytes(optimizer: Optimizer) -> int:
    if isinstance(optimizer, EfcpOptimizer):
        return optimizer.state_bytes()
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))


def log_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The log as a table: a row per evaluation, or per logged step of a run that evaluated once or never.

    Args:
        history: `trainer.state.log_history`.

    Returns:
        Rows with `step`, `epoch`, `loss` (the training loss logged last) and the `eval_` metrics.
    """
    by_evaluation = len({entry["step"] for entry in history if evaluation_metrics(entry)}) > 1
    rows: dict[int, dict[str, float]] = {}
    loss: dict[str, float] = {}
    for entry in history:
        if "loss" in entry:
            loss = {"loss": entry["loss"]}
        metrics = evaluation_metrics(entry)
        if metrics or ("loss" in entry and not by_evaluation):
            start = {"step": entry["step"], "epoch": entry.get("epoch", 0.0), **loss}
            rows.setdefault(entry["step"], start).update(metrics)
    return list(rows.values())


def evaluation_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a log entry, without timings; empty for a training entry."""
    return {
        name: value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(_BOOKKEEPING) and isinstance(value, (int, float))
    }


def last_evaluation(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of the last evaluation, empty where there was none."""
    return next((row for row in reversed(rows) if evaluation_metrics(row)), {})


def readable(name: str) -> str:
    """A log entry's name as a reader knows it."""
    named = {"loss": "training loss", "eval_loss": "validation loss"}
    return named.get(name, name.removeprefix("eval_").replace("_", " "))


def hardware(device: torch.device) -> str:
    """The processor that `device` is, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def command_line(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The shell command that started this process, or `None` in a notebook.

    Paths under the working directory are given relative to it, others by their last part; tokens are left out.

    Args:
        argv: interpreter, its flags, program and arguments; `sys.orig_argv` by default.
        environ: where torchrun says how many processes it started.
    """
    interpreter, *arguments = sys.orig_argv if argv is None else argv
    if any("ipykernel" in argument for argument in arguments[:3]):
        return None
    words = _without_secrets(arguments)
    is_console_script = bool(words) and Path(words[0]).parent == Path(interpreter).parent
    words = [_portable(word) for word in words]
    if is_console_script:
        words[0] = Path(words[0]).name
    if "TORCHELASTIC_RUN_ID" in environ:
        words = ["torchrun", "--nproc_per_node", environ["LOCAL_WORLD_SIZE"], *(w for w in words if w != "-u")]
    elif not is_console_script:
        words.insert(0, "python")
    return shlex.join(words).replace(shlex.quote(_REDACTED), _REDACTED)


def _without_secrets(words: Sequence[str]) -> list[str]:
    kept = []
    after_flag = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if after_flag and not word.startswith("-"):
            word = _REDACTED
        elif equals and _SECRET_FLAG.match(flag):
            word = f"{flag}={_REDACTED}"
        after_flag = bool(_SECRET_FLAG.match(word))
        kept.append(_SECRET_VALUE.sub(_REDACTED, word))
    return kept


def _portable(word: str) -> str:
    flag, equals, value = word.partition("=")
    path = Path(value if equals and flag.startswith("-") else word)
    if not path.is_absolute():
        return word
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return f"{flag}={shown}" if equals and flag.startswith("-") else shown
