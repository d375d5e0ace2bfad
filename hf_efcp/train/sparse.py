"""Sparse training inside a Trainer's run: masks, gradient correction and adversary, at the events of its steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_efcp.sparsity import CorrectionOptions, Sparsifier
from hf_efcp.train import sparse_files
from hf_efcp.train.adversary import Adversary, make_adversary
from hf_efcp.train.callbacks import own_optimizer
from hf_efcp.train.corrected_step import CorrectedStep, Evaluate, loss_scale
from hf_efcp.train.sparse_options import SparseOptions

logger = logging.getLogger(__name__)

_ALIKE = 0.005  # densities that differ by less are the same
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class SparseTraining:
    """One run's masks and corrections. `EfcpTrainer` makes it when model and optimizer are ready, and calls it.

    Args:
        trainer: with model, optimizer and scheduler prepared.
        options: what the user asked for.
        adversary: see `EfcpTrainer`.
        max_steps, steps_per_epoch: of the run.

    Raises:
        NotImplementedError: the run shards its parameters, or replays recorded graphs.
        ValueError: settings that do not fit the model, or masks saved with it.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: SparseOptions,
        adversary: Adversary | None,
        max_steps: int,
        steps_per_epoch: int,
    ):
        refuse_unsupported(trainer, options)
        self._trainer, self._steps_per_epoch = trainer, steps_per_epoch
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self._adversary = adversary or (make_adversary(options.adversary) if options.adversary else None)
        self.sparsifier = self._sparsifier(options, max_steps) if options.sparsity is not None else None
        self.correction = None
        if options.correction is not None:
            _check_length(trainer, options.correction)
            length = steps_per_epoch if self._has_length() else None
            self.correction = CorrectedStep(trainer, options.correction, self.sparsifier, length, self._prepared)
        self._begins_step = True
        trainer.remove_callback(SparseCallback)  # of an earlier train()
        trainer.add_callback(SparseCallback(self))

    def _sparsifier(self, options: SparseOptions, max_steps: int) -> Sparsifier:
        schedule = {"total_steps": max_steps, "steps_per_epoch": self._steps_per_epoch}
        assert options.sparsity is not None
        made = Sparsifier(
            self.model, options.sparsity, options.method, seed=self._trainer.args.seed, **schedule, **options.settings
        )
        source = getattr(self.model, "name_or_path", None)
        saved = sparse_files.load_masks(source) if "initial" not in options.settings else None
        if saved is not None:
            wanted = made.density()
            made.load_masks(saved)
            if abs(made.density() - wanted) > _ALIKE:
                raise ValueError(
                    f"The masks saved in {source} have sparsity {1 - made.density():.4f}, and training is to begin at "
                    f"{1 - wanted:.4f}. Give that sparsity, or new masks with `sparse_args` initial=magnitude."
                )
            logger.info("Masks are those saved in %s.", source)
        return made

    def start(self) -> None:
        """Mask the weights of a run that begins or goes on."""
        if self.sparsifier is not None:
            self.sparsifier.apply_(self._trainer.optimizer)  # pyright: ignore[reportArgumentType]
            logger.info("Sparse training: %.4f of %d weights.", self.sparsifier.density(), self.sparsifier.size)

    # ---- steps

    def training_step(self, evaluate: Evaluate, model: nn.Module, inputs: Mapping[str, Any], count: Any) -> Tensor:
        """Trainer's `training_step` (`evaluate`), adversarial, corrected and masked."""
        if self._begins_step and self.correction is not None:
            self.correction.begin_step(evaluate, model)
        self._begins_step = self._trainer.accelerator.sync_gradients
        inputs = self._prepared(model, inputs)
        if self.correction is None:
            loss = evaluate(model, inputs, count)
        else:
            loss = self.correction.micro_batch(evaluate, model, inputs, count)
        if self._begins_step:
            self._finish_gradients()
        return loss

    def _finish_gradients(self) -> None:
        # Here and not in a callback: gradients are clipped before the first callback after the backward pass.
        if self.correction is not None:
            self.correction.finish_gradients()
        elif self.sparsifier is not None:
            self.sparsifier.observe_(scale=loss_scale(self._trainer))
        if self.sparsifier is not None:
            self.sparsifier.mask_gradients_()

    def _prepared(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch, attacked at today's weights. Gradients that an adversary leaves behind are thrown away."""
        if self._adversary is None:
            return inputs
        inputs = self._trainer._prepare_inputs(inputs)  # pyright: ignore[reportArgumentType]
        gradients = [(p, p.grad) for p in self.model.parameters()]
        for p, _ in gradients:
            p.grad = None
        try:
            # Not the wrapper of several processes, which waits for a backward pass after each forward.
            model.train()
            attacked = self._adversary(self._trainer.accelerator.unwrap_model(model), inputs)
        finally:
            for p, gradient in gradients:
                p.grad = gradient
        if not isinstance(attacked, Mapping):
            raise TypeError(f"`adversary` must return the inputs to train on, a dict, got {type(attacked).__name__}.")
        return attacked

    def begin_epoch(self) -> None:
        """Note where the random generators stand when an epoch's data loader is started; not in the middle of one."""
        if self.correction is None:
            return
        step = self._trainer.state.global_step
        resumed = step > 0 and step == self._trainer._initial_global_step
        if step % self._steps_per_epoch == 0 if self._has_length() else not resumed:
            self.correction.begin_epoch()

    def _has_length(self) -> bool:
        return has_length(self._trainer.callback_handler.train_dataloader)

    # ---- figures and files

    def metrics(self) -> dict[str, float]:
        """Figures for the log. Waits for the device."""
        figures = {}
        if self.sparsifier is not None:
            figures["sparse_density"] = self.sparsifier.density()
            figures["sparse_exploration"] = self.sparsifier.exploration()
            figures["sparse_changes"] = self.sparsifier.changes
        if self.correction is not None:
            figures["agent_coefficient"] = self.correction.coefficient
            figures["agent_slope"] = self.correction.core.slope.slope
            core = self.correction.core
            known = {"newest_slope": core.slope.newest, "correlation": core.slope.correlation, "noise": core.noise}
            figures.update({f"agent_{name}": value for name, value in known.items() if value is not None})
        return figures

    def save_masks(self, folder: str) -> None:
        """Write the masks beside the weights."""
        if self.sparsifier is not None:
            sparse_files.save_masks(self.sparsifier.packed_masks(), folder)

    def load_masks(self, folder: str) -> None:
        """Take over a checkpoint's masks, with its weights in place."""
        masks = sparse_files.load_masks(folder) if self.sparsifier is not None else None
        if masks is not None:
            self.sparsifier.load_masks(masks)  # pyright: ignore[reportOptionalMemberAccess]

    def save_state(self, folder: str) -> None:
        """Write what resuming needs; the first process what all share, each its own random state."""
        args = self._trainer.args
        if self.correction is not None:
            sparse_files.save_random(self.correction.epoch_state, folder, args.process_index)
        if args.should_save:
            parts = {"sparsifier": self.sparsifier, "correction": self.correction and self.correction.core}
            sparse_files.save_state({name: part and part.state_dict() for name, part in parts.items()}, folder)

    def load_state(self, folder: str) -> None:
        """Go on where a checkpoint was written.

        Raises:
            RuntimeError: it has no masks: they would be others than those it was trained with.
            ValueError: its masks are of another sparsity.
        """
        made = self.sparsifier
        wanted = None if made is None or made.method.gradual else made.density()  # gradual pruning is on its way
        self._load_state(folder)
        if wanted is not None and abs(made.density() - wanted) > _ALIKE:  # pyright: ignore[reportOptionalMemberAccess]
            raise ValueError(
                f"{folder} was trained with sparsity {1 - made.density():.4f}, and this run asks for {1 - wanted:.4f}; "  # pyright: ignore[reportOptionalMemberAccess]
                "resume with the same. To change it, load the weights with from_pretrained."
            )

    def _load_state(self, folder: str) -> None:
        state = sparse_files.load_state(folder)
        if state is None or (self.sparsifier is not None and state["sparsifier"] is None):
            self._load_masks_alone(folder)
            return
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        if self.correction is not None and state["correction"] is not None:
            self.correction.core.load_state_dict(state["correction"])
            saved = sparse_files.load_random(folder, self._trainer.args.process_index)
            self.correction.epoch_state = saved or self.correction.epoch_state
        elif self.correction is not None:
            logger.warning("%s was trained without a correction; it begins at the second refresh from here.", folder)

    def _load_masks_alone(self, folder: str) -> None:
        if self.sparsifier is None:
            return
        masks = sparse_files.load_masks(folder)
        if masks is None:
            raise RuntimeError(
                f"{folder} holds no masks, so it was not trained sparsely. To make its weights sparse, load them with "
                "from_pretrained and start a run, without resume_from_checkpoint."
            )
        logger.warning(
            "%s was saved with save_only_model: schedules go on, snapshot and exploration begin anew.", folder
        )
        self.sparsifier.load_masks(masks)
        self.sparsifier.step = self._trainer.state.global_step


class SparseCallback(TrainerCallback):
    """Trainer's events around the optimizer's step, for `SparseTraining`."""

    def __init__(self, training: SparseTraining):
        self._training = training

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._training.begin_epoch()

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        sparsifier = self._training.sparsifier
        if sparsifier is not None and sparsifier.replaces_step:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers leave a parameter without a gradient as it is

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        if self._training.sparsifier is not None:
            skipped = bool(getattr(optimizer, "step_was_skipped", False))
            self._training.sparsifier.finish_step_(optimizer, skipped=skipped)


def _check_length(trainer: Trainer, options: CorrectionOptions) -> None:
    """Raise `ValueError` where the training data has no length, and a whole epoch of it is asked for."""
    if has_length(trainer.callback_handler.train_dataloader):
        return
    if options.refresh == "epoch" or options.full_grad_batches is None:
        raise ValueError(
            "The training data has no length, so no epoch: give `correction_args` a number of steps for `refresh` and "
            "of batches for `full_grad_batches`, as in refresh=1000,full_grad_batches=50."
        )


def refuse_unsupported(trainer: Trainer, options: SparseOptions) -> None:
    """Raise `NotImplementedError` by name where masks or swapped weights cannot work."""
    advice = "Train on one process or with DDP (torchrun), which keep whole parameters."
    if trainer.is_fsdp_enabled or trainer.args.fsdp:
        raise NotImplementedError(f"Sparse training does not work with FSDP, which shards parameters. {advice}")
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(f"Sparse training does not work with DeepSpeed (ZeRO). {advice}")
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in name or "layerwise" in name:
        raise NotImplementedError(f"Sparse training needs gradients after the backward pass; {name} keeps none.")
    if any(hasattr(p, "device_mesh") for p in trainer.model.parameters()):  # pyright: ignore[reportOptionalMemberAccess]
        raise NotImplementedError(f"Sparse training does not work with parameters that are sharded (DTensor). {advice}")
    if options.correction is None:
        return
    graphs = _recorded_graphs(trainer)
    if graphs is not None:
        raise NotImplementedError(
            "gradient_correction swaps weights, which CUDA graphs do not see: use torch_compile_mode=default instead "
            f"of {graphs}."
        )
    optimizer = own_optimizer(trainer.optimizer)
    if optimizer is not None and hasattr(optimizer, "explain_parameters"):
        raise NotImplementedError(
            f"gradient_correction does not work with {type(optimizer).__name__}, whose curvature statistics would take "
            "in the snapshot's. Use efcp_mfac, or train without gradient_correction."
        )


def _recorded_graphs(trainer: Trainer) -> str | None:
    """The mode or backend of torch.compile that records CUDA graphs; asked for by arguments or by accelerate."""
    args, plugin = trainer.args, trainer.accelerator.state.dynamo_plugin
    backend = str(getattr(plugin.backend, "value", plugin.backend)).lower()  # pyright: ignore[reportOptionalMemberAccess]
    words = [plugin.mode, backend]  # pyright: ignore[reportOptionalMemberAccess]
    if args.torch_compile:
        words += [args.torch_compile_mode, args.torch_compile_backend]
    if (plugin.options or {}).get("triton.cudagraphs"):  # pyright: ignore[reportOptionalMemberAccess]
        return "triton.cudagraphs"
    return next((word for word in words if word in (*_GRAPH_MODES, "cudagraphs")), None)
