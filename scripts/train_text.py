"""Fine-tune a text model to classify texts or pairs of texts, or to give them a number.

    python scripts/train_text.py --model_name_or_path MODEL --dataset_name DATA --output_dir out/text

MODEL and DATA are Hub ids or local folders. Labels that are no whole numbers or words are regressed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from metrics import load_metrics
from training import DataArguments, check_column, class_names, label_maps, load_splits, train_and_save
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments

_TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"))


@dataclass(kw_only=True)
class TextArguments(DataArguments):
    """Which model, and which columns hold the text."""

    model_name_or_path: str = field(metadata={"help": "Hub id of a model, or a local folder."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; found by its usual names."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, if there is one."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train adapters of this rank (LoRA) and the head alone; needs peft."}
    )
    dora: bool = field(default=False, metadata={"help": "Let the adapters have a magnitude of their own (DoRA)."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; longer ones are cut."})

    def columns(self, features: list[str]) -> tuple[str, ...]:
        """The text's one or two columns. Raises `ValueError` where they cannot be found."""
        if self.text_column:
            return (self.text_column, self.text_pair_column) if self.text_pair_column else (self.text_column,)
        for columns in _TEXT_COLUMNS:
            if all(column in features for column in columns):
                return columns
        raise ValueError(f"--text_column takes one of {', '.join(features)}.")


def tokenized(examples: Dataset, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], data: TextArguments):
    """The examples as token ids and `labels`, without the columns that they had."""

    def convert(batch: dict[str, list]) -> dict[str, list]:
        words = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=data.max_length)
        return {**words, "labels": batch[data.label_column]}

    return examples.map(convert, batched=True, remove_columns=examples.column_names)


def with_adapters(model: PreTrainedModel, rank: int, *, dora: bool) -> PreTrainedModel:
    """The model with LoRA or DoRA on all its linear layers but the head, which is trained whole."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora
    )
    return get_peft_model(model, config)


def main() -> None:
    data, args = HfArgumentParser((TextArguments, EfcpTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    train, validation = load_splits(data)
    columns = data.columns(train.column_names)
    for column in columns:
        check_column(column, train.features, "--text_column")
    names = class_names(train.features[data.label_column])
    head = label_maps(names) if names else {"num_labels": 1, "problem_type": "regression"}
    tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        data.model_name_or_path, ignore_mismatched_sizes=True, **head
    )
    if data.lora_rank is not None:
        model = with_adapters(model, data.lora_rank, dora=data.dora)
    usual = "accuracy" if names else "pearsonr,spearmanr"
    trainer = EfcpTrainer(
        model=model,
        args=args,
        train_dataset=tokenized(train, tokenizer, columns, data),
        eval_dataset=tokenized(validation, tokenizer, columns, data),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=load_metrics((data.metric or usual).split(","), regression=not names),
    )
    train_and_save(trainer, data, data.model_name_or_path)


if __name__ == "__main__":
    main()
