"""Trainer's checkpoints: written with the state of all ranks, chosen where complete, refused with the file's name."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from hf_efcp.optim.registry import list_optimizers
from hf_efcp.train.callbacks import own_optimizer

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
# What a method of Trainer reads, by names in the order in which it does: which of them it was says the first that is
# broken, or the first that is there.
_READ_BY = {
    "_load_from_checkpoint": ("model*.safetensors", "pytorch_model*", "adapter_model*"),
    "_load_optimizer_and_scheduler": ("optimizer*", "scheduler.pt"),
    "_load_scaler": ("scaler.pt",),
    "_load_rng_state": ("rng_state*.pth",),
}
# Of torch.load (OSError where a file is cut off), of safetensors and of ours; KeyError and TypeError of foreign files.
_BROKEN = (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError, SafetensorError)


def last_complete_checkpoint(folder: str) -> str | None:
    """The newest `checkpoint-N` of a run that was written to its end, `None` where there is none.

    Trainer writes `trainer_state.json` last. A process that is killed while it saves leaves a folder without, which
    `transformers.trainer_utils.get_last_checkpoint` would take.
    """
    numbered = []
    for entry in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r"checkpoint-(\d+)", entry)
        if match and os.path.isdir(os.path.join(folder, entry)):
            numbered.append((int(match[1]), os.path.join(folder, entry)))
    for _, path in sorted(numbered, reverse=True):
        if _is_complete(path):
            return path
        logger.warning("%s is incomplete: its process ended while it wrote. An earlier checkpoint is taken.", path)
    return None


def _is_complete(path: str) -> bool:
    try:
        with open(os.path.join(path, _STATE), encoding="utf-8") as file:
            return "global_step" in json.load(file)
    except (OSError, ValueError):
        return False


def wrap_saving_and_loading(trainer_class: type) -> None:
    """Let Trainer's own methods join the state of all ranks before rank 0 saves, and name the file that does not load.

    All processes enter them, whatever made them save: interval, epoch, best metric or a callback.
    """
    _wrap(trainer_class, "_save_optimizer_and_scheduler", _joined)
    _wrap(trainer_class, "_load_from_checkpoint", _with_state)
    for name in _READ_BY:
        _wrap(trainer_class, name, _NAMED[name])


def _wrap(owner: type, name: str, wrapper: Callable[[Any, Any], contextlib.AbstractContextManager]) -> None:
    method = getattr(owner, name)
    if wrapper in getattr(method, "wrappers", ()):
        return

    @functools.wraps(method)
    def wrapped(trainer: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        with wrapper(trainer, folder):
            return method(trainer, folder, *args, **kwargs)

    earlier = getattr(method, "wrappers", ())
    setattr(wrapped, "wrappers", (*earlier, wrapper))  # noqa: B010 - a function has no such attribute for a type checker
    setattr(owner, name, wrapped)


def _joined(trainer: Any, folder: str) -> contextlib.AbstractContextManager:
    optimizer = own_optimizer(trainer.optimizer)
    return contextlib.nullcontext() if optimizer is None else optimizer.whole_state(keeps=trainer.args.should_save)


@contextlib.contextmanager
def _named(patterns: tuple[str, ...], trainer: Any, folder: str | None) -> Iterator[None]:
    """Name what does not load, where the optimizer is one of this package."""
    try:
        yield
    except _BROKEN as error:
        is_named = str(error).startswith(str(folder)) or getattr(error, "filename", None)
        if folder is None or is_named or not _is_ours(trainer):
            raise
        path, text = _culprit(folder, patterns), " ".join(str(error).split())
        into = _target(trainer, os.path.basename(path))
        raise RuntimeError(
            f"{path} does not load{into}: {text if len(text) <= 400 else text[:397] + '...'} Resume from another "
            "checkpoint, or start anew from the weights with from_pretrained."
        ) from error


_NAMED = {name: functools.partial(_named, patterns) for name, patterns in _READ_BY.items()}


@contextlib.contextmanager
def _with_state(trainer: Any, folder: str | None) -> Iterator[None]:
    """Weights, and the step at which they were saved, which Trainer reads next."""
    yield
    path = os.path.join(folder or "", _STATE)
    if folder is not None and _is_ours(trainer) and os.path.isfile(path) and not _is_complete(folder):
        raise RuntimeError(f"{path} does not load: it is not the state of a Trainer, or was cut off.")


def _is_ours(trainer: Any) -> bool:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    return own_optimizer(trainer.optimizer) is not None or name in list_optimizers()


def _target(trainer: Any, file_name: str) -> str:
    """What the file should have gone into."""
    if file_name.startswith("optimizer"):
        return f" into {type(own_optimizer(trainer.optimizer)).__name__}"
    return f" into {type(trainer.model).__name__}" if "model" in file_name else ""


def _culprit(folder: str, patterns: tuple[str, ...]) -> str:
    """The first file of these names that cannot be read; where all can, the first that is there."""
    paths = [path for pattern in patterns for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))]
    return next((path for path in paths if not _is_readable(path)), (paths or [os.path.join(folder, patterns[0])])[0])


def _is_readable(path: str) -> bool:
    try:
        if path.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                json.load(file)
        elif path.endswith(".safetensors"):
            with safe_open(path, "pt"):
                pass
        elif os.path.isfile(path):
            with safe_globals():  # random numbers are saved with numpy's types
                torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN:
        return False
    return True
