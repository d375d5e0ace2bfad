"""Tiny models, data and training runs."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)


@pytest.fixture(scope="session")
def tiny_bert():
    """A function that makes the same BERT classifier each time, dropout included."""

    def make():
        set_seed(0)
        config = BertConfig(
            vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )  # fmt: skip
        return BertForSequenceClassification(config)

    return make


@pytest.fixture(scope="session")
def tiny_vit():
    """A function that makes the same ViT classifier each time."""

    def make(n_layers=2):
        set_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=n_layers,
            num_attention_heads=2, intermediate_size=32, num_labels=4,
        )  # fmt: skip
        return ViTForImageClassification(config)

    return make


@pytest.fixture(scope="session")
def texts():
    ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]


@pytest.fixture(scope="session")
def images():
    pixels = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(pixels)]


@pytest.fixture
def arguments(tmp_path):
    """A function that makes training arguments for eight quiet steps of batch 8 on the CPU."""

    def make(cls=TrainingArguments, **changes):
        given = {
            "output_dir": str(tmp_path / "run"), "max_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 2,
            "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        return cls(**{**given, **changes})

    return make
