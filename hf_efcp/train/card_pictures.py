"""The pictures of a model card, drawn from the log history and from tensors."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_efcp.plot import PANELS, bars, curves, draw, spectrum_curves
from hf_efcp.train.callbacks import own_optimizer
from hf_efcp.train.run_record import OptimizerRecord
from hf_efcp.train.spectrum import spectra

logger = logging.getLogger(__name__)

FOLDER = "figures"


def write_pictures(folder: Path, trainer: Trainer, optimizer: OptimizerRecord) -> dict[str, str]:
    """Draw what there is to draw.

    Args:
        folder: of the card; the pictures go to `figures/` in it.
        trainer: after training.
        optimizer: measured.

    Returns:
        Paths relative to `folder`, of `loss`, `spectrum` and `memory`; without those that have nothing to show, and
        empty where matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("The model card has no pictures: they need matplotlib, pip install matplotlib.")
        return {}
    drawn: dict[str, Any] = {}
    history = [entry for entry in trainer.state.log_history if "step" in entry]
    if curves(PANELS[0], history):
        drawn["loss"] = draw([PANELS[0]], history, title="")
    own = own_optimizer(trainer.optimizer)
    if own is not None and (spectrum := spectra(own)):
        drawn["spectrum"] = spectrum_curves(spectrum)
    if optimizer.state_bytes:
        drawn["memory"] = bars(_megabytes(trainer, optimizer), unit="MB")
    paths = {name: f"{FOLDER}/{name}.png" for name in drawn}
    if paths:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / paths[name], format="png", dpi=110)
    return paths


def _megabytes(trainer: Trainer, optimizer: OptimizerRecord) -> dict[str, float]:
    assert trainer.model is not None
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    sizes = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        optimizer.name: optimizer.state_bytes,
        "AdamW's moments": optimizer.adamw_bytes,
    }
    return {name: size / 1e6 for name, size in sizes.items()}
