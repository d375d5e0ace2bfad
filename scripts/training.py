"""What the training scripts have in common: data in, a trained model with its card out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from metrics import NAMES
from transformers import Trainer


@dataclass
class DataArguments:
    """Which data, and which of its columns."""

    dataset_name: str = field(metadata={"help": "Hub id of a data set, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default validation, or test where there is none."}
    )
    metric: str | None = field(
        default=None, metadata={"help": f"Comma-separated metrics, of {', '.join(NAMES)}; by default the task's."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many."})


def load_splits(arguments: DataArguments) -> tuple[Dataset, Dataset]:
    """Training and validation examples.

    Raises:
        ValueError: the split to evaluate on, or the label column, does not exist.
    """
    splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    held_out = arguments.validation_split or ("validation" if "validation" in splits else "test")
    if held_out not in splits:
        raise ValueError(f"No split `{held_out}` in {arguments.dataset_name}; --validation_split: {', '.join(splits)}.")
    train, validation = splits["train"], splits[held_out]
    check_column(arguments.label_column, train.features, "--label_column")
    if isinstance(train.features[arguments.label_column], Value):
        train, validation = _with_classes(train, validation, arguments.label_column)
    return _first(train, arguments.max_train_samples), _first(validation, arguments.max_eval_samples)


def _with_classes(train: Dataset, validation: Dataset, column: str) -> tuple[Dataset, Dataset]:
    """Whole numbers and words as classes, named by what stands in the training data; fractions as they are."""
    if train.features[column].dtype.startswith(("float", "double")):
        return train, validation
    label = ClassLabel(names=[str(value) for value in sorted(set(train[column]))])
    features = Features({**train.features, column: label})

    def encode(example: dict[str, Any]) -> dict[str, Any]:
        return {column: label.str2int(str(example[column]))}

    return train.map(encode, features=features), validation.map(encode, features=features)


def _first(examples: Dataset, count: int | None) -> Dataset:
    return examples if count is None else examples.select(range(min(count, len(examples))))


def check_column(column: str, features: Features, flag: str) -> None:
    """Raise `ValueError` where the data has no such column."""
    if column not in features:
        raise ValueError(f"No column `{column}`; {flag} takes one of {', '.join(features)}.")


def class_names(label: Any) -> list[str] | None:
    """Names of the classes of a column, `None` of one that holds numbers to regress."""
    return label.names if isinstance(label, ClassLabel) else None


def label_maps(names: list[str]) -> dict[str, Any]:
    """What a model's config says about its classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def train_and_save(trainer: Trainer, data: DataArguments, model_name: str | None) -> None:
    """Train, evaluate, save model and card, and with `--push_to_hub` push them."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    name = " ".join(filter(None, (Path(data.dataset_name).name, data.dataset_config_name)))
    facts = {
        "dataset": name,
        "dataset_tags": data.dataset_name,
        "dataset_args": data.dataset_config_name,
        "finetuned_from": model_name,
    }
    if args.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)
