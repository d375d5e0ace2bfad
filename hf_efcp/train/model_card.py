"""The model card of a run: valid Hub metadata, and each figure from the log history or from tensors."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer

from hf_efcp.train.callbacks import TAG
from hf_efcp.train.run_record import OptimizerRecord, command_line, evaluation_metrics, hardware, log_rows

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_MAX_LOG_ROWS = 20
_FILE_FORMATS = ("arrow", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text")  # no data set's name
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForAudioClassification": "audio-classification",
}


def write_model_card(
    folder: str | os.PathLike,
    trainer: Trainer,
    *,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> Path:
    """
    Write `README.md`, the card of what `trainer` trained.

    The keywords are those of `Trainer.create_model_card`. Names of local folders never reach the metadata: they are
    shortened to their last part where a name is needed, and left out where only a Hub id makes sense.

    Args:
        folder (`str`): Where the model is saved.
        trainer ([`~transformers.Trainer`]): After training; before it the card has no log and no memory figures.
        model_name (`str`, *optional*, defaults to the folder's name): Title, and name in the model index.
        finetuned_from (`str`, *optional*): The model that training started from, by default its config's.
        tasks (`str`, *optional*): Hub task ids, by default from the model's class.
        dataset_tags (`str`, *optional*): Hub ids of the data sets; `dataset` are their readable names, `dataset_args`
            their configurations.

    Returns:
        The card's path.
    """
    folder = Path(folder)
    data_sets = _data_sets(trainer, _listed(dataset_tags), _listed(dataset), _listed(dataset_args))
    optimizer = _optimizer_record(trainer)
    rows = log_rows(trainer.state.log_history)
    name = model_name or folder.resolve().name
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        base_model=_base_model(finetuned_from, trainer.model),
        datasets=[d["id"] for d in data_sets if d["id"]] or None,
        tags=[TAG, optimizer.name, "generated_from_trainer", *_listed(tags)],
        pipeline_tag=next(iter(_tasks(trainer.model, tasks)), None),
        model_name=name,
        eval_results=_eval_results(rows, _tasks(trainer.model, tasks), data_sets) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=name,
        architecture=type(trainer.model).__name__,
        base_model=metadata.base_model,
        dataset_names=[d["name"] for d in data_sets],
        optimizer=optimizer,
        settings=_settings(trainer),
        world_size=trainer.args.world_size,
        command=command_line(),
        circumstances=_circumstances(trainer),
        **_tables(rows),
    )
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / "README.md")
    return folder / "README.md"


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


# ------------------------------------------------------------------- metadata


def _is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id, and is no path of this machine."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_model(finetuned_from: str | None, model: torch.nn.Module) -> str | None:
    """The Hub id of the weights that training started from, where they demonstrably came from the Hub."""
    config = getattr(model, "config", None)
    name = finetuned_from or getattr(config, "_name_or_path", None)
    if not _is_hub_id(name):
        return None
    # A folder that is gone by now looks like an id; what was downloaded has a commit or stands in the cache.
    downloaded = getattr(config, "_commit_hash", None) or isinstance(try_to_load_from_cache(name, "config.json"), str)
    return name if downloaded else None


def _data_sets(trainer: Trainer, ids: list[str], names: list[str], configs: list[str]) -> list[dict[str, str | None]]:
    """Each data set; what nobody said about them is taken from the evaluation data."""
    held = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    info, split = getattr(held, "info", None), getattr(held, "split", None)
    loaded_as = getattr(info, "dataset_name", None)
    if not ids and not names and loaded_as and loaded_as not in _FILE_FORMATS:
        names, configs = [loaded_as], [info.config_name]
    count = max(len(ids), len(names))
    ids, names, configs = (values + [None] * (count - len(values)) for values in (ids, names, configs))
    found = []
    for hub_id, name, config in zip(ids, names, configs[:count], strict=True):
        shown = name or hub_id
        shown = shown if name and not _is_path(name) else Path(shown).name
        hub_id = hub_id if _is_hub_id(hub_id) else None
        kind = hub_id or shown.lower().replace(" ", "-")
        found.append(
            {"id": hub_id, "type": kind, "name": shown, "config": config, "split": str(split) if split else None}
        )
    return found


def _is_path(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "~", "/"))


def _tasks(model: torch.nn.Module, given: str | list[str] | None) -> list[str]:
    kind = type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
    return _listed(given) or [task for ending, task in _TASKS.items() if kind.endswith(ending)]


def _eval_results(rows: list[dict[str, float]], tasks: list[str], data_sets: list[dict]) -> list[EvalResult]:
    """The last evaluation's metrics for the model index; the loss alone where there is nothing else."""
    metrics = evaluation_metrics(_last_evaluation(rows))
    metrics = {name: value for name, value in metrics.items() if not name.endswith("loss")} or metrics
    data = data_sets[0] if data_sets else {"type": "unknown", "name": "unknown", "config": None, "split": None}
    return [
        EvalResult(
            task_type=tasks[0] if tasks else "other",
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_config=data["config"],
            dataset_split=data["split"],
            metric_type=name.removeprefix("eval_"),
            metric_name=_readable(name),
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


# ----------------------------------------------------------------------- text


def _optimizer_record(trainer: Trainer) -> OptimizerRecord:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is None:
        return OptimizerRecord(name, "", {}, 0, 0, 0)
    return OptimizerRecord.of(trainer.optimizer, name)


def _settings(trainer: Trainer) -> list[tuple[str, Any]]:
    """What Trainer's own arguments say about a step, and the learning rate that the optimizer started with."""
    args = trainer.args
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = ("steps", args.max_steps) if args.max_steps > 0 else ("epochs", args.num_train_epochs)
    clipping = f"norm {args.max_grad_norm:g}, before the optimizer sees them" if args.max_grad_norm else "none"
    return [
        ("learning rate", ", ".join(f"{rate:g}" for rate in _learning_rates(trainer))),
        ("schedule", f"{scheduler}, {args.warmup_steps:g} warm-up" if args.warmup_steps else scheduler),
        ("weight decay", f"{args.weight_decay:g}"),
        ("gradients clipped at", clipping),
        ("batch", batch),
        steps,
    ]


def _learning_rates(trainer: Trainer) -> list[float]:
    """Before any schedule, of each parameter group where they differ; `optim_args` may have set it."""
    if trainer.optimizer is None:
        return [trainer.args.learning_rate]
    groups = trainer.optimizer.param_groups
    return list(dict.fromkeys(float(group.get("initial_lr", group["lr"])) for group in groups))


def _tables(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The results and the log as strings; of a long log evenly spaced rows, first and last among them."""
    if not rows:
        return {"results": [], "log": [], "n_logged": 0}
    evaluation = _last_evaluation(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    last = len(rows) - 1
    kept = sorted({round(i * last / (_MAX_LOG_ROWS - 1)) for i in range(_MAX_LOG_ROWS)})
    return {
        "results": [(_readable(name), _figure(value)) for name, value in evaluation_metrics(evaluation).items()],
        "results_step": evaluation.get("step"),
        "log_header": [_readable(name) for name in columns],
        "log": [[_figure(rows[i].get(name)) for name in columns] for i in kept],
        "n_logged": len(rows),
    }


def _last_evaluation(rows: list[dict[str, float]]) -> dict[str, float]:
    return next((row for row in reversed(rows) if evaluation_metrics(row)), {})


def _readable(name: str) -> str:
    named = {"loss": "training loss", "eval_loss": "validation loss"}
    return named.get(name, name.removeprefix("eval_").replace("_", " "))


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _circumstances(trainer: Trainer) -> list[tuple[str, str]]:
    args = trainer.args
    packages: Mapping[str, str] = {name: version(name) for name in ("hf-efcp", "torch", "transformers", "accelerate")}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}
    autocast = ", bfloat16 autocast" if args.bf16 else ", float16 autocast" if args.fp16 else ""
    processes = f" in {args.world_size} processes" if args.world_size > 1 else ""
    seeds = f"{args.seed}" + (f", data {args.data_seed}" if args.data_seed is not None else "")
    return [
        ("hardware", hardware(args.device) + processes),
        ("parameters", ", ".join(sorted(dtypes)) + autocast),
        ("seed", seeds),
        ("software", ", ".join(f"{name} {number}" for name, number in packages.items())),
        ("Python", platform.python_version()),
    ]
