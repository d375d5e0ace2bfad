"""Metrics of the optimizer in Trainer's logs, and tags on the model, in scripts that know nothing of this package."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.train.run_record import registered_spec

logger = logging.getLogger(__name__)

TAG = "hf_efcp"
PREFIX = "optim_"


class EfcpCallback(TrainerCallback):
    """Adds `optimizer.metrics()` to the log entries of training; does nothing with other optimizers.

    Registration appends it to transformers' default callbacks, which run before those that report to
    TensorBoard and the like. Reading metrics waits for the device, so it happens at logging steps alone; all
    processes take part.
    """

    def __init__(self):
        self._skipped = 0
        self._introduced = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer, model = own_optimizer(kwargs.get("optimizer")), kwargs.get("model")
        if optimizer is None:
            return
        self._skipped = optimizer.skipped_steps
        scaler = getattr(kwargs["optimizer"], "scaler", None)  # accelerate's, in fp16
        use_scaler = getattr(optimizer, "use_scaler", None)
        if scaler is not None and use_scaler is not None:
            use_scaler(scaler)
        if model is not None and hasattr(model, "add_model_tags"):
            model.add_model_tags([TAG, optimizer_name(args, optimizer)])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = own_optimizer(kwargs.get("optimizer"))
        if hasattr(optimizer, "record_metrics"):
            optimizer.record_metrics = will_log(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = own_optimizer(kwargs.get("optimizer"))
        if optimizer is None or self._introduced:
            return
        self._introduced = True  # after a step, since some optimizers cannot tell their state before
        if state.is_world_process_zero:
            line = introduction(args, optimizer)
            if args.disable_tqdm:
                logger.info(line)
            else:
                tqdm.write(line, file=sys.stderr)  # above Trainer's bar, in a notebook too

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        optimizer: Any = own_optimizer(kwargs.get("optimizer"))
        if optimizer is None or logs is None or "loss" not in logs:
            return
        figures = optimizer.metrics()
        if getattr(optimizer, "logs_diagnostics", False):
            figures.update(optimizer.diagnostics())
        metrics = {f"{PREFIX}{name}": value for name, value in figures.items()}
        logs.update(metrics)
        # Trainer has put a copy of the entry into its history before it calls.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)
        self._report_skipped(optimizer.skipped_steps, state)

    def _report_skipped(self, skipped: int, state: TrainerState) -> None:
        if skipped > self._skipped and state.is_world_process_zero:
            logger.warning(
                "%d of the steps up to %d were left out because a gradient or an update was not finite (%d in all).",
                skipped - self._skipped,
                state.global_step,
                skipped,
            )
        self._skipped = skipped


class EfcpMetricsCallback(TrainerCallback):
    """Adds `optimizer.diagnostics()` to the log entries of training: how the curvature shapes the steps.

    Spectrum of the Gram matrix (`optim_eigenvalue_1`, …, `optim_effective_rank`), scaling and rotation of the gradient
    by preconditioning as EFCP (arXiv 2306.06098) quantifies it (`optim_preconditioning_scale`,
    `optim_preconditioning_cosine`), and what compression holds back (`optim_residual_over_gradient`).

        Trainer(…, callbacks=[EfcpMetricsCallback()])

    Each logged step then copies its gradient once and solves an m×m eigenproblem. `EfcpCallback` writes the figures,
    since a callback that is given to a Trainer runs after those that report to TensorBoard and the like.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = own_optimizer(kwargs.get("optimizer"))
        if hasattr(optimizer, "diagnostics"):
            optimizer.logs_diagnostics = True
        elif state.is_world_process_zero:
            kind = type(getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))).__name__
            logger.warning("EfcpMetricsCallback has nothing to log: %s has no diagnostics.", kind)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = own_optimizer(kwargs.get("optimizer"))
        if hasattr(optimizer, "diagnostics"):
            optimizer.logs_diagnostics = False


def will_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether Trainer may log after the step that begins now."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    # The end of an epoch is not known from here.
    return args.logging_strategy == IntervalStrategy.EPOCH


def introduction(args: TrainingArguments, optimizer: EfcpOptimizer) -> str:
    """A line: which optimizer, its window where it has one, what it keeps, and what AdamW would."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count, size = sum(p.numel() for p in parameters), optimizer.state_bytes()
    adamw = sum(2 * p.numel() * p.element_size() for p in parameters)
    window = f", window={optimizer.defaults['window']}" if "window" in optimizer.defaults else ""
    return (
        f"{optimizer_name(args, optimizer)}{window}: {size / 1e6:,.1f} MB of state for {count:,} parameters, "
        f"{size / max(1, count):.2f} bytes each; AdamW would keep {adamw / max(1, count):.2f}."
    )


def optimizer_name(args: TrainingArguments, optimizer: Optimizer) -> str:
    """The name that `--optim` had; where it was built in code the first that means this, as in the model card."""
    spec = registered_spec(optimizer, str(getattr(args.optim, "value", args.optim)))
    return spec.name if spec else type(optimizer).__name__


def own_optimizer(optimizer: Any) -> EfcpOptimizer | None:
    """The optimizer of this package inside accelerate's wrapper, or `None` where there is none."""
    while not isinstance(optimizer, EfcpOptimizer):
        if not hasattr(optimizer, "optimizer"):
            return None
        optimizer = optimizer.optimizer
    return optimizer
