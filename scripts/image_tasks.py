"""Image tasks of the quality benchmark: a pretrained MobileNet, and small ViTs from scratch.

Sized for a CPU and without augmentation. The images of `cifar10` are JPEG copies of a part of CIFAR-10, so its
figures compare optimizers and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from tasks import Task, digits
from text_tasks import Sources, part
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

MOBILENET = "mobilenet_v1_0.25_224_imagenet"


class Images(torch.utils.data.Dataset):
    """Images in bytes, handed out as floats from -1 to 1, so that a data set takes a quarter of the memory."""

    def __init__(self, rows: Iterable[dict[str, Any]], column: str):
        examples = [(np.array(row[column].convert("RGB")), int(row["label"])) for row in rows]
        self.images = torch.stack([torch.from_numpy(image) for image, _ in examples])
        self.labels = [label for _, label in examples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.images[index].permute(2, 0, 1).to(torch.float32) / 127.5 - 1
        return {"pixel_values": pixels, "labels": self.labels[index]}


def flowers(sources: Sources) -> Task:
    """Five kinds of flowers at 128×128 pixels, and MobileNetV1 0.25 with ImageNet's weights."""
    splits = load_dataset(str(sources.data / "flowers5"))
    return Task(
        name="flowers5",
        hub_task="image-classification",
        train=Images(splits["train"], "image"),
        validation=Images(splits["validation"], "image"),
        new_model=lambda: mobilenet(sources.models / MOBILENET),
        steps=96,
        batch_size=16,
        learning_rate=1e-3,
    )


def mobilenet(folder: Path) -> PreTrainedModel:
    """MobileNetV1 with a new head of five classes."""
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.05  # transformers takes TensorFlow's 0.9997, which in torch forgets all but one batch
    return model


def cifar10(sources: Sources) -> Task:
    """5000 images of CIFAR-10, and a ViT of four layers from scratch."""
    splits = load_dataset(str(sources.data / "cifar10"))
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=10,
    )
    return Task(
        name="CIFAR-10 (part)",
        hub_task="image-classification",
        train=Images(part(splits["train"], 5000), "img"),
        validation=Images(part(splits["test"], 500), "img"),
        new_model=lambda: ViTForImageClassification(config),
        steps=240,
        batch_size=32,
        learning_rate=5e-4,
    )


def handwriting(_: Sources) -> Task:
    """The demonstration's ViT on handwritten digits."""
    return digits()
