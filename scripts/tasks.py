"""Training tasks that the demonstration and the benchmarks share: data, model, and how long to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import EvalPrediction, PreTrainedModel, ViTConfig, ViTForImageClassification


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Args:
        name: readable name of the data.
        hub_task: the Hub's word for the kind of task.
        train, validation: examples as a data collator takes them.
        new_model: builds the model; its weights depend on torch's seed.
        steps, batch_size, learning_rate: the usual run.
    """

    name: str
    hub_task: str
    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    new_model: Callable[[], PreTrainedModel]
    steps: int
    batch_size: int
    learning_rate: float


def digits() -> Task:
    """scikit-learn's 1797 handwritten digits, 8×8 pixels, every fifth for validation, and a small ViT."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    examples = [{"pixel_values": image, "labels": int(y)} for image, y in zip(images, data.target, strict=True)]
    train, validation = train_test_split(examples, test_size=0.2, random_state=0, stratify=data.target)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=10,
    )
    return Task(
        name="scikit-learn digits",
        hub_task="image-classification",
        train=train,
        validation=validation,
        new_model=lambda: ViTForImageClassification(config),
        steps=400,
        batch_size=64,
        learning_rate=1e-3,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose largest logit is the label's."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}
