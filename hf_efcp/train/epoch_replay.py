"""The batches of a running epoch once more, without the epoch noticing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import skip_first_batches
from accelerate.state import GradientState
from torch.utils.data import DataLoader


@contextlib.contextmanager
def replayed(loader: DataLoader, epoch: int, skip: int = 0) -> Iterator[DataLoader]:
    """A loader of an epoch's batches in the epoch's own order, from batch `skip` on.

    It shares data set and sampler with `loader`, whose own iteration may be under way. A sampler that is seeded by
    the epoch needs nothing else; for others, and for random augmentation, put the random state of the epoch's start
    in place before iterating. What iterating changes in samplers and in accelerate is put back at the end.
    """
    samplers = _samplers(loader)
    before = [(sampler, getattr(sampler, "epoch", None), _generator_state(sampler)) for sampler in samplers]
    gradients = GradientState()
    loaders = list(gradients.dataloader_references)
    # A new loader even where nothing is skipped: one with persistent workers has a single iterator.
    again = skip_first_batches(loader, skip)
    if hasattr(again, "iteration"):
        again.iteration = epoch  # pyright: ignore[reportAttributeAccessIssue]
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
    try:
        yield again
    finally:
        for sampler, number, state in before:
            if number is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
            if state is not None:
                sampler.generator.set_state(state)
        gradients.dataloader_references = loaders  # a loader that is not read to its end stays among them


def _samplers(loader: DataLoader) -> list[Any]:
    """Everything that decides on the order: the samplers, and the samplers inside them."""
    found: list[Any] = []
    waiting = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    while waiting:
        sampler = waiting.pop()
        if sampler is not None and not any(sampler is known for known in found):
            found.append(sampler)
            waiting += [getattr(sampler, "batch_sampler", None), getattr(sampler, "sampler", None)]
    return found


def _generator_state(sampler: Any) -> Any:
    generator = getattr(sampler, "generator", None)
    return None if generator is None else generator.get_state()
