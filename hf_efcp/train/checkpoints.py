"""Trainer's checkpoints: written with the state of all ranks, chosen where complete, refused with the file's name."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

from hf_efcp.train.callbacks import own_optimizer

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer.pt"
_BROKEN = (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)  # of torch.load and of ours


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
        with open(os.path.join(path, "trainer_state.json"), encoding="utf-8") as file:
            return "global_step" in json.load(file)
    except (OSError, ValueError):
        return False


def wrap_saving_and_loading(trainer_class: type) -> None:
    """Let Trainer's own methods join the state of all ranks before rank 0 saves, and name the file that does not load.

    All processes enter them, whatever made them save: interval, epoch, best metric or a callback.
    """
    _wrap(trainer_class, "_save_optimizer_and_scheduler", _joined)
    _wrap(trainer_class, "_load_optimizer_and_scheduler", _named)


def _wrap(owner: type, name: str, wrapper: Callable[[Any, Any], contextlib.AbstractContextManager]) -> None:
    method = getattr(owner, name)
    if getattr(method, "is_wrapped", False):
        return

    @functools.wraps(method)
    def wrapped(trainer: Any, folder: Any) -> Any:
        with wrapper(trainer, folder):
            return method(trainer, folder)

    setattr(wrapped, "is_wrapped", True)  # noqa: B010 - a function has no such attribute for a type checker
    setattr(owner, name, wrapped)


def _joined(trainer: Any, folder: str) -> contextlib.AbstractContextManager:
    optimizer = own_optimizer(trainer.optimizer)
    return contextlib.nullcontext() if optimizer is None else optimizer.whole_state(keeps=trainer.args.should_save)


@contextlib.contextmanager
def _named(trainer: Any, folder: str | None) -> Iterator[None]:
    optimizer = own_optimizer(trainer.optimizer)
    if folder is None or optimizer is None:
        yield
        return
    try:
        yield
    except _BROKEN as error:
        text = " ".join(str(error).split())
        raise RuntimeError(
            f"{os.path.join(folder, _OPTIMIZER)} does not load into {type(optimizer).__name__}: "
            f"{text if len(text) <= 400 else text[:397] + '...'} Resume from another one, or start anew from the "
            "weights with from_pretrained."
        ) from error
