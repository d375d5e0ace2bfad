"""Image tasks of the quality benchmark: a pretrained MobileNet, and small ViTs from scratch.

Sized for a CPU and without augmentation. The images of `cifar10` are JPEG copies of a part of CIFAR-10, so its
figures compare optimizers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def __init__(self, rows: list[dict[str, Any]], column: str):
        self.images = torch.stack([torch.from_numpy(np.array(row[column].convert("RGB"))) for row in rows])
        self.labels = [int(row["label"]) for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.images[index].permute(2, 0, 1).to(torch.float32) / 127.5 - 1
        return {"pixel_values": pixels, "labels": self.labels[index]}


def flowers(sources: Sources) -> Task:
    """Five kinds of flowers at 128×128 pixels, and MobileNetV1 0.25 with ImageNet's weights."""
    splits = load_dataset(str(sources.data / "flowers5"))
    return _classified(
        "flowers5",
        splits["train"],
        splits["validation"],
        "image",
        lambda: mobilenet(sources.models / MOBILENET),
        96,
        16,
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
    train, validation = (part(splits[name], count) for name, count in (("train", 5000), ("test", 500)))
    return _classified("CIFAR-10 (part)", train, validation, "img", lambda: ViTForImageClassification(config), 240, 32)


def handwriting(_: Sources) -> Task:
    """The demonstration's ViT on handwritten digits."""
    return digits()


def _classified(
    name: str, train: Any, validation: Any, column: str, new_model: Callable[[], PreTrainedModel], steps: int, size: int
) -> Task:
    return Task(
        name=name,
        hub_task="image-classification",
        train=Images(list(train), column),
        validation=Images(list(validation), column),
        new_model=new_model,
        steps=steps,
        batch_size=size,
        learning_rate=1e-3,
    )
