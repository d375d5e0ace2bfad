"""AGENT inside Trainer: two backward passes a batch, and the full gradient at the snapshot."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_efcp.sparsity import CorrectionOptions, GradientCorrection, Sparsifier
from hf_efcp.sparsity.correction import preserved_buffers
from hf_efcp.train.epoch_replay import replayed
from hf_efcp.train.random_state import preserved_random_state, random_state, restore_random_state

logger = logging.getLogger(__name__)

_BACK_OFF = 1 / 16  # of the loss scale, where the full gradient overflows
_TRIES = 5

Evaluate = Callable[..., Tensor]  # Trainer.training_step: forward and backward of a micro-batch
Prepare = Callable[[nn.Module, Mapping[str, Any]], Mapping[str, Any]]


class CorrectedStep:
    """Turns the gradients of Trainer's steps into AGENT's, before they are clipped.

    The gradient at the snapshot is that of the same batch, adversarial or not, with the same dropout masks, from a
    second backward pass of `−c·loss` into the same gradients; processes exchange gradients once a step, as without
    it. A second gradient is held only in models of 16-bit parameters, at steps that change the topology without
    replacing the optimizer's step, and where `coefficient=grad` measures; those steps exchange gradients twice.

    Args:
        trainer: whose steps these are.
        options: see `CorrectionOptions`.
        sparsifier: of the model, if it is sparse.
        steps_per_epoch: optimizer steps in an epoch; `None` where the data is a stream without a length.
        prepare: changes a batch before it is used, as an adversary does.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: CorrectionOptions,
        sparsifier: Sparsifier | None,
        steps_per_epoch: int | None,
        prepare: Prepare,
    ):
        self._trainer, self._sparsifier, self._prepare = trainer, sparsifier, prepare
        self._steps_per_epoch = steps_per_epoch
        self._model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self.core = GradientCorrection(self._model, options, sparsifier.masks if sparsifier else ())
        self.epoch_state = random_state()  # of the generators when the epoch began
        self._begun = 0, 0  # of a stream: passes that were begun before, and the step at which this one began
        self.coefficient = 0.0  # of the step that is being taken
        self._apart = self._measures = False
        self._gradients: dict[str, Tensor] = {}
        self._at_snapshot: dict[str, Tensor] = {}

    # ---- a step

    def begin_epoch(self) -> None:
        """Note how things stand when the data is read from its start."""
        passes, began = self._begun
        step = self._trainer.state.global_step
        self._begun = passes + (step != began), step
        self.epoch_state = random_state()

    def begin_step(self, evaluate: Evaluate, model: nn.Module) -> None:
        """Refresh the snapshot where that is due, and settle how this step is taken."""
        step = self._trainer.state.global_step
        if self.core.is_due(step, self._steps_per_epoch):  # pyright: ignore[reportArgumentType]
            self.refresh(evaluate, model)
        options, sparsifier = self.core.options, self._sparsifier
        replaced = sparsifier is not None and sparsifier.replaces_step
        self.coefficient = 0.0 if replaced else self.core.coefficient(step / max(1, self._trainer.state.max_steps))
        self._measures = (
            options.coefficient == "grad"
            and bool(self.core.full_gradient)
            and step % options.measure_every == 0
            and not replaced
        )
        is_narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.core.parameters.values())
        grows = sparsifier is not None and sparsifier.is_due and sparsifier.method.grow == "gradient"
        self._apart = self._measures or (self.coefficient != 0 and (is_narrow or grows))
        self._gradients, self._at_snapshot = {}, {}

    def micro_batch(self, evaluate: Evaluate, model: nn.Module, inputs: Mapping[str, Any], count: Any) -> Tensor:
        """Both passes of a micro-batch; returns the loss at today's weights."""
        if self.coefficient == 0 and not self._apart:
            return evaluate(model, inputs, count)
        before = random_state()
        exchanges = self._trainer.accelerator.sync_gradients and not self._apart
        with self._trainer.accelerator.no_sync(model) if exchanges else contextlib.nullcontext():
            loss = evaluate(model, inputs, count)
        after = random_state()
        if self._apart:
            self._gradients = self._exchanged(self._at_snapshot)
        restore_random_state(before)
        with self.core.swapped(), self._weighted(1.0 if self._apart else -self.coefficient):
            evaluate(model, inputs, count)
        restore_random_state(after)
        if self._apart:
            self._at_snapshot = self._exchanged(self._gradients)
        return loss

    def _exchanged(self, replacement: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the gradients out of the parameters, and put others in."""
        taken = {}
        for name, p in self.core.parameters.items():
            if p.grad is not None:
                # A view into a bucket is written by the next exchange between processes.
                taken[name] = p.grad.clone() if p.grad._is_view() else p.grad
            p.grad = replacement.get(name)
        return taken

    def finish_gradients(self) -> None:
        """After the last micro-batch: make the gradients the corrected ones, and let the sparsifier see the plain."""
        scale, core = loss_scale(self._trainer), self.core
        if self._apart:
            if self._measures:
                masks = self._sparsifier.masks if self._sparsifier else {}
                core.measure_(self._gradients, self._at_snapshot, scale, masks)
            if self._sparsifier:
                self._sparsifier.observe_(self._gradients, scale)
            core.combine_(self._gradients, self._at_snapshot, self.coefficient, scale)
        else:
            if self.coefficient:
                core.add_full_gradient_(self.coefficient, scale)
            if self._sparsifier:
                self._sparsifier.observe_(scale=scale)
        self._gradients, self._at_snapshot = {}, {}

    @contextlib.contextmanager
    def _weighted(self, weight: float | None) -> Iterator[None]:
        """Backward passes are of `weight` times the loss inside; there are none with `None`.

        At `accelerator.backward`, because every way of computing a loss in Trainer or a subclass ends there.
        """
        accelerator = self._trainer.accelerator
        backward, was_set = accelerator.backward, "backward" in vars(accelerator)

        def weighted(loss: Tensor, **kwargs: Any) -> None:
            if weight is not None:
                backward(loss if weight == 1 else loss * weight, **kwargs)

        accelerator.backward = weighted
        try:
            yield
        finally:
            if was_set:
                accelerator.backward = backward
            else:
                del accelerator.backward

    # ---- the full gradient

    def refresh(self, evaluate: Evaluate, model: nn.Module) -> None:
        """Take the snapshot; except for the first, with the gradient over an epoch's batches and a new coefficient.

        The batches, their order and what is random about them are those of the running epoch, which goes on as if
        nothing had happened: generators, samplers, buffers and gradients are put back.
        """
        step = self._trainer.state.global_step
        if not self.core.snapshot:
            # There is nothing to correlate with yet: the first period is not corrected.
            self.core.take_snapshot_(step)
            return
        self.core.full_gradient = {}  # the old one and the new one are never held together
        weight = 1.0
        for _ in range(_TRIES):
            gradient, losses, snapshot_losses = self._full_gradient(evaluate, model, weight)
            if all(bool(value.isfinite().all()) for value in gradient.values()):
                self.core.refresh_(step, gradient, losses, snapshot_losses)
                return
            if self._trainer.accelerator.scaler is None:
                break
            weight *= _BACK_OFF
        logger.warning("The full gradient before step %d is not finite; there is no correction for a while.", step + 1)
        self.core.take_snapshot_(step)

    def _full_gradient(
        self, evaluate: Evaluate, model: nn.Module, weight: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Mean gradient over batches, and each batch's losses at θ and at the snapshot, averaged over processes."""
        trainer, core = self._trainer, self.core
        accumulation, synchronizes = trainer.current_gradient_accumulation_steps, trainer.accelerator.sync_gradients
        sends_buffers = getattr(model, "require_forward_param_sync", None)  # DDP: before the next forward pass
        held = self._exchanged({})
        with preserved_random_state(), preserved_buffers(self._model), trainer.accelerator.no_sync(model):
            restore_random_state(self.epoch_state)
            total, losses = self._summed(evaluate, model, weight)
        self._exchanged(held)
        if sends_buffers is not None:
            model.require_forward_param_sync = sends_buffers
        trainer.current_gradient_accumulation_steps = accumulation
        trainer.accelerator.gradient_state._set_sync_gradients(synchronizes)
        with torch.no_grad():
            if trainer.accelerator.num_processes > 1:
                for name, p in core.parameters.items():  # one after another: the exchange works on a copy
                    mine = total[name] if name in total else torch.zeros_like(p)
                    total[name] = trainer.accelerator.reduce(mine, reduction="mean")  # pyright: ignore[reportArgumentType]
                losses = trainer.accelerator.reduce(losses, reduction="mean")
            for value in total.values():
                value.div_(loss_scale(trainer) * weight * len(losses))
            return total, losses[:, 0], losses[:, 1]

    def _summed(self, evaluate: Evaluate, model: nn.Module, weight: float) -> tuple[dict[str, Tensor], Tensor]:
        """Σ g_b(θ), scaled as backward passes are, and the losses (M, 2) at θ and at the snapshot."""
        trainer, total, losses = self._trainer, {}, []
        for batches, count in self._steps_batches():
            trainer.current_gradient_accumulation_steps = len(batches)
            pairs = [self._losses(evaluate, model, batch, count, weight) for batch in batches]
            losses.append(torch.stack(pairs).sum(0))
            for name, gradient in self._exchanged({}).items():
                # Sums over an epoch are taken in float32, also where the parameters are in 16 bits.
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                total[name] = total[name].add_(wide) if name in total else wide
        if not losses:
            raise ValueError("There is no batch to take the full gradient from; the training data is empty.")
        return total, torch.stack(losses)

    def _losses(
        self, evaluate: Evaluate, model: nn.Module, batch: Mapping[str, Any], count: Any, weight: float
    ) -> Tensor:
        batch = self._prepare(model, batch)
        before = random_state()
        with self._weighted(weight):
            now = evaluate(model, batch, count)
        if self.core.options.coefficient != "loss":
            return torch.stack([now.double(), now.double()])
        restore_random_state(before)
        with self.core.swapped(), torch.no_grad(), self._weighted(None):
            old = evaluate(model, batch, count)
        return torch.stack([now.double(), old.double()])

    def _steps_batches(self) -> Iterator[tuple[list[Any], Any]]:
        """The micro-batches of one optimizer step after another, with what Trainer counts in them."""
        trainer = self._trainer
        accumulation, limit = trainer.args.gradient_accumulation_steps, self.core.options.full_grad_batches
        epoch, skip = self._position(limit)
        for start in dict.fromkeys((skip * accumulation, 0)):  # at its beginning, where a stream has ended
            found = False
            with replayed(trainer.callback_handler.train_dataloader, epoch, start) as loader:  # pyright: ignore[reportArgumentType]
                iterator = iter(loader)
                for _ in itertools.count() if limit is None else range(limit):
                    batches, count = trainer.get_batch_samples(iterator, accumulation, trainer.args.device)
                    if not batches:
                        break
                    found = True
                    yield batches, count
            if found:
                return

    def _position(self, limit: int | None) -> tuple[int, int]:
        """The number of the running epoch, and of the step in it from which on its batches are read again.

        A part of an epoch begins at the step that is to come, so another refresh sees other batches.
        """
        step, per_epoch = self._trainer.state.global_step, self._steps_per_epoch
        if per_epoch is None:
            passes, began = self._begun
            return passes, step - began
        epoch, done = divmod(step, per_epoch)
        return epoch, 0 if limit is None else max(0, min(done, per_epoch - limit))


def loss_scale(trainer: Trainer) -> float:
    """What losses are multiplied by before a backward pass: the scale of a GradScaler, or 1."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else scaler.get_scale()
