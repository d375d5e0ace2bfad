"""The model card of a run: valid Hub metadata, and each figure from the log history or from tensors."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from torch.optim import Optimizer
from transformers import Trainer

from hf_efcp.train.callbacks import TAG
from hf_efcp.train.card_metadata import (
    base_model_id,
    eval_results,
    hub_tasks,
    known_data_sets,
    listed,
    plain,
    write_eval_results,
)
from hf_efcp.train.card_pictures import write_pictures
from hf_efcp.train.run_record import (
    OptimizerRecord,
    command_line,
    evaluation_metrics,
    hardware,
    last_evaluation,
    log_rows,
    readable,
)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_MAX_LOG_ROWS = 20


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
    Write `README.md`, the card of what `trainer` trained, with its pictures in `figures/`, and `.eval_results/` where
    the data set is one of the Hub.

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
    folder, model = Path(folder), trainer.model
    assert model is not None  # before training a Trainer with `model_init` has built one already
    data_sets = known_data_sets(trainer, listed(dataset_tags), listed(dataset), listed(dataset_args))
    optimizer = _optimizer_record(trainer)
    rows = log_rows(trainer.state.log_history)
    name = model_name or folder.resolve().name
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if hasattr(model, "peft_config") else "transformers",
        base_model=base_model_id(finetuned_from, model),
        datasets=[d["id"] for d in data_sets if d["id"]] or None,
        tags=[TAG, optimizer.name, "generated_from_trainer", *listed(tags)],
        pipeline_tag=next(iter(hub_tasks(model, tasks)), None),
        model_name=name,
        eval_results=eval_results(rows, hub_tasks(model, tasks), data_sets) or None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=plain(name),
        architecture=type(model).__name__,
        base_model=metadata.base_model,
        dataset_names=[plain(d["name"]) for d in data_sets],
        optimizer=optimizer,
        options=_cells(optimizer.options.items()),
        settings=_cells(_settings(trainer)),
        world_size=trainer.args.world_size,
        pictures=write_pictures(folder, trainer, optimizer),
        circumstances=_cells(_circumstances(trainer)),
        **_command(),
        **_tables(rows),
    )
    card.save(folder / "README.md")
    write_eval_results(folder, metadata.eval_results or [], data_sets)
    return folder / "README.md"


# ----------------------------------------------------------------------- text


def _optimizer_record(trainer: Trainer) -> OptimizerRecord:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is None:
        return OptimizerRecord(name, "", {}, 0, 0, 0)
    return OptimizerRecord.of(cast("Optimizer", trainer.optimizer), name)


def _cells(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(plain(name), plain(value)) for name, value in pairs]


def _command() -> dict[str, str | None]:
    """The command, and a fence that is longer than any row of backticks in it."""
    command = command_line()
    rows = re.findall("`+", command or "")
    return {"command": command, "fence": "`" * max([3, *(len(row) + 1 for row in rows)])}


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
    groups = cast("Optimizer", trainer.optimizer).param_groups
    return list(dict.fromkeys(float(group.get("initial_lr", group["lr"])) for group in groups))


def _tables(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The results and the log as strings; of a long log evenly spaced rows, first and last among them."""
    if not rows:
        return {"results": [], "log": [], "n_logged": 0}
    evaluation = last_evaluation(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    last = len(rows) - 1
    kept = sorted({round(i * last / (_MAX_LOG_ROWS - 1)) for i in range(_MAX_LOG_ROWS)})
    return {
        "results": [(plain(readable(name)), _figure(value)) for name, value in evaluation_metrics(evaluation).items()],
        "results_step": evaluation.get("step"),
        "log_header": [plain(readable(name)) for name in columns],
        "log": [[_figure(rows[i].get(name)) for name in columns] for i in kept],
        "n_logged": len(rows),
    }


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _circumstances(trainer: Trainer) -> list[tuple[str, str]]:
    args = trainer.args
    packages: Mapping[str, str] = {name: version(name) for name in ("hf-efcp", "torch", "transformers", "accelerate")}
    parameters = [] if trainer.model is None else trainer.model.parameters()
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
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
