"""Trainer, with what an optimizer of this package needs and resume that restores every weight."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_efcp.train.adversary import Adversary
from hf_efcp.train.callbacks import own_optimizer
from hf_efcp.train.checkpoints import last_complete_checkpoint
from hf_efcp.train.hub import told_plainly, watch
from hf_efcp.train.model_card import write_model_card
from hf_efcp.train.resume import load_converted, refuse_lost_parameters
from hf_efcp.train.sparse import SparseTraining
from hf_efcp.train.sparse_options import sparse_options

logger = logging.getLogger(__name__)


class EfcpTrainer(Trainer):
    """A `Trainer` that differs in six things.

    - `train(resume_from_checkpoint=True)` passes over a checkpoint whose process was killed while it wrote.
    - Resuming, and loading the best model at the end, restores weights that are saved under other names than the
      model's, a ViT's encoder among them (see `hf_efcp.train.resume`). Resuming with a parameter that the
      checkpoint does not hold is an error, as it would go on from random values.
    - The model card of a run with an optimizer of this package says with what options it ran and at what cost.
    - A push that the Hub refuses, or that a lost connection ends, is one sentence that says what is safe and what to
      do; Trainer never tells of one that failed during training.
    - It tells SINGD of how many tokens the loss is the mean.
    - Where its arguments (`EfcpTrainingArguments`) or the launcher ask for it, it trains sparsely, with AGENT's
      gradient correction, or on adversarial examples (see `hf_efcp.train.sparse`).

    Metrics of the optimizer come into the logs of any Trainer by `EfcpCallback`, which importing `hf_efcp.train`
    registers. Decay groups, clipping, scheduling and evaluation are Trainer's. `max_grad_norm` (1.0 by default)
    clips gradients before the optimizer sees them, so a window holds clipped gradients; 0 turns it off.

    Args:
        adversary (`Callable`, *optional*):
            Called once for each batch on (model, inputs), at the current weights; returns the inputs to train on.
            `hf_efcp.train.FGSM` and `PGD` are made for images. Other arguments are those of `Trainer`.
    """

    _loading: tuple[str, bool] | None = None
    _sparse: SparseTraining | None = None

    def __init__(self, *args: Any, adversary: Adversary | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._adversary = adversary

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Raises:
            ValueError: there is none.
        """
        if resume_from_checkpoint is True:
            folder = self._folder
            resume_from_checkpoint = last_complete_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No complete checkpoint in {folder}; leave out `resume_from_checkpoint` to start anew."
                )
        return super().train(resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._restoring(resume_from_checkpoint, refuses_losses=True):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # At the end of a run of hours a loss is told, not raised: the last weights are still to be saved.
        best = str(self.state.best_model_checkpoint)
        with self._restoring(best, refuses_losses=False):
            super()._load_best_model()
        if self._sparse is not None:
            self._sparse.load_masks(best)

    @contextlib.contextmanager
    def _restoring(self, folder: str, *, refuses_losses: bool) -> Iterator[None]:
        self._loading = (folder, refuses_losses)
        try:
            yield
        finally:
            self._loading = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer calls this with the names that its plain `load_state_dict` left out."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_renamed = load_result.missing_keys and isinstance(model, PreTrainedModel)
        # accelerate saves a sharded model under the names that it has in memory.
        if is_renamed and self._loading is not None and not self.is_fsdp_enabled:
            folder, refuses_losses = self._loading
            load_result = load_converted(model, folder)
            if refuses_losses:
                refuse_lost_parameters(model, load_result, folder)
        super()._issue_warnings_after_load(load_result)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, at construction with `push_to_hub=True`. Raises `PushError` where it cannot be."""
        with told_plainly(self._repository(), self._folder):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save model and card and push them, as `Trainer` does. Raises `PushError` where the Hub does not take them."""
        with told_plainly(self._repository(), self._folder):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if (
            self._sparse is not None and self.is_world_process_zero()
        ):  # Trainer copies the files of the model that it knows
            self._sparse.save_masks(self._folder)
        before = _pushes(self)
        super()._push_from_checkpoint(checkpoint_folder)
        watch([job for job in _pushes(self) if job not in before], self._repository(), self._folder)

    @property
    def _folder(self) -> str:
        return str(self.args.output_dir)  # `TrainingArguments` puts a name where none is given

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(self._folder))

    # ---- sparse training

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._sparse = None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        options = sparse_options(self.args, has_adversary=self._adversary is not None)
        if options is not None:
            _, steps_per_epoch, *_ = self.set_initial_training_values(self.args, train_dataloader)
            self._sparse = SparseTraining(self, options, self._adversary, max_steps, steps_per_epoch)
            if resume_from_checkpoint is not None:
                self._sparse.load_state(resume_from_checkpoint)
            self._sparse.start()
        return prepared

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """See `Trainer.training_step`; in sparse training, corrected and masked."""
        _tell_loss_terms(self, num_items_in_batch)
        if self._sparse is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self._sparse.training_step(super().training_step, model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer.log`; entries of training gain the figures of sparse training."""
        if self._sparse is not None and "loss" in logs:
            logs.update(self._sparse.metrics())
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._sparse is not None and self.args.should_save:
            self._sparse.save_masks(output_dir or self._folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sparse is not None:
            self._sparse.save_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._sparse is not None:
            self._sparse.begin_epoch()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of this package; Trainer's own after another optimizer, or where jinja2 is missing."""
        is_ours = own_optimizer(self.optimizer) is not None
        if is_ours and importlib.util.find_spec("jinja2") is None:
            if self.is_world_process_zero():
                logger.warning("The model card is Trainer's own: that of hf_efcp needs jinja2, pip install jinja2.")
            is_ours = False
        if not is_ours:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            facts = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            write_model_card(self._folder, self, **facts)


def _tell_loss_terms(trainer: Trainer, count: Any) -> None:
    """Let SINGD know of how many tokens or samples the step's loss is the mean, all micro-batches together.

    Trainer counts them where the loss is divided by their number. What one process counts for itself is not the
    number of all, whose rows SINGD sums: there each layer goes by its own count.
    """
    optimizer: Any = own_optimizer(trainer.optimizer)
    is_number = isinstance(count, (int, float)) or (isinstance(count, Tensor) and count.ndim == 0)
    is_of_all = trainer.args.average_tokens_across_devices or trainer.args.world_size == 1
    if is_number and is_of_all and hasattr(optimizer, "set_loss_terms"):
        optimizer.set_loss_terms(count)


def _pushes(trainer: Trainer) -> list[Any]:
    """The background pushes that Trainer knows of."""
    return list(getattr(getattr(trainer, "push_in_progress", None), "jobs", None) or ())


def replace_trainer() -> None:
    """Make `transformers.Trainer` this class, for scripts and libraries that import it from now on."""
    import transformers
    from transformers import trainer

    # The package fills its names in on first use, and Seq2SeqTrainer derives from the one in its own module.
    transformers.Trainer = trainer.Trainer = EfcpTrainer
