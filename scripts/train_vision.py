"""Train a vision model to classify images: a pretrained one, or one built from a config.

    python scripts/train_vision.py --model_name_or_path MODEL --dataset_name DATA --output_dir out/vision
    python scripts/train_vision.py --config_name CONFIG --dataset_name DATA --output_dir out/vision

MODEL, CONFIG and DATA are Hub ids or local folders. CONFIG may be a model type as well (`vit`), with
`--config_overrides image_size=8,patch_size=2,num_channels=1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metrics import load_metrics
from training import DataArguments, check_column, class_names, label_maps, load_splits, train_and_save
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    ViTImageProcessor,
    set_seed,
)

from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments


@dataclass
class VisionArguments(DataArguments):
    """Which model, and which column holds the images."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained weights to start from."})
    config_name: str | None = field(default=None, metadata={"help": "Config, or type, of a model with new weights."})
    config_overrides: str | None = field(default=None, metadata={"help": "Its fields, as name=value,name=value."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})

    def __post_init__(self):
        if bool(self.model_name_or_path) == bool(self.config_name):
            raise ValueError("Give --model_name_or_path to start from weights, or --config_name to start without.")


def new_config(data: VisionArguments, head: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model with new weights."""
    is_type = data.config_name in CONFIG_MAPPING
    config = CONFIG_MAPPING[data.config_name]() if is_type else AutoConfig.from_pretrained(data.config_name)
    config.update(head)
    if data.config_overrides:
        config.update_from_string(data.config_overrides)
    return config


def image_processor(data: VisionArguments, config: PreTrainedConfig) -> Any:
    """The processor that came with the weights, else one that resizes to the model's size and scales to [-1, 1]."""
    if data.model_name_or_path:
        return AutoImageProcessor.from_pretrained(data.model_name_or_path)
    half = [0.5] * config.num_channels
    size = {"height": config.image_size, "width": config.image_size}
    return ViTImageProcessor(size=size, image_mean=half, image_std=half)


def pixels(processor: Any, data: VisionArguments, n_channels: int) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Turns a batch of images, when it is asked for, into what the model takes."""
    mode = "L" if n_channels == 1 else "RGB"

    def convert(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[data.image_column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[data.label_column]}

    return convert


def main() -> None:
    data, args = HfArgumentParser((VisionArguments, EfcpTrainingArguments)).parse_args_into_dataclasses()
    args.remove_unused_columns = False  # images become pixels only when a batch is asked for
    set_seed(args.seed)
    train, validation = load_splits(data)
    check_column(data.image_column, train.features, "--image_column")
    names = class_names(train.features[data.label_column])
    if names is None:
        raise ValueError(f"`{data.label_column}` holds fractions; images are classified, by whole numbers or words.")
    if data.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            data.model_name_or_path, ignore_mismatched_sizes=True, **label_maps(names)
        )
    else:
        model = AutoModelForImageClassification.from_config(new_config(data, label_maps(names)))
    processor = image_processor(data, model.config)
    convert = pixels(processor, data, getattr(model.config, "num_channels", 3))
    trainer = EfcpTrainer(
        model=model,
        args=args,
        train_dataset=train.with_transform(convert),
        eval_dataset=validation.with_transform(convert),
        processing_class=processor,
        compute_metrics=load_metrics((data.metric or "accuracy").split(","), regression=False),
    )
    train_and_save(trainer, data, data.model_name_or_path)


if __name__ == "__main__":
    main()
