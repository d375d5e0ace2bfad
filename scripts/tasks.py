"""Training tasks that the demonstration and the benchmarks share: data, model, and how long to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose largest logit is the label's."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Args:
        name: readable name of the data.
        hub_task: the Hub's word for the kind of task.
        train, validation: examples as a data collator takes them.
        new_model: builds the model; its weights depend on torch's seed.
        steps, batch_size, learning_rate: the usual run.
        tokenizer: pads the examples of a batch; `None` where they have one shape.
        collator: makes a batch of examples where the tokenizer's padding is not enough.
        metric: name of the figure of merit among those that `compute_metrics` returns.
        prepare_logits: what of the model's output is kept for `compute_metrics`, where all of it were much.
    """

    name: str
    hub_task: str
    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    new_model: Callable[[], PreTrainedModel]
    steps: int
    batch_size: int
    learning_rate: float
    tokenizer: PreTrainedTokenizerBase | None = None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    metric: str = "accuracy"
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] = accuracy
    prepare_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


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


def trec(data: str | Path, model: str | Path) -> Task:
    """Questions by what they ask for, six coarse classes, and a pretrained encoder with a new head.

    Args:
        data: folder or hub id of TREC with the columns `text` and `coarse_label`; its test split is for validation.
        model: folder or hub id of the encoder.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    splits = load_dataset(str(data))
    examples = {
        name: [
            {**tokenizer(text, truncation=True), "labels": label}
            for text, label in zip(split["text"], split["coarse_label"], strict=True)
        ]
        for name, split in splits.items()
    }
    n_labels = 1 + max(example["labels"] for example in examples["train"])
    return Task(
        name="TREC coarse",
        hub_task="text-classification",
        train=examples["train"],
        validation=sorted(examples["test"], key=lambda example: len(example["input_ids"])),  # batches pad little
        new_model=lambda: AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels),
        steps=170,
        batch_size=32,
        learning_rate=2e-4,
        tokenizer=tokenizer,
    )
