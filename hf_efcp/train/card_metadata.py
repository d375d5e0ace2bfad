"""What the Hub reads of a model card: base model, data sets, tasks, results; never a path of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer

from hf_efcp.train.run_record import evaluation_metrics, last_evaluation, readable

_FILE_FORMATS = ("arrow", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text")  # no data set's name
_MARKUP = re.compile(r"[\\`*|\[\]<>&#]")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
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


def listed(value: str | Sequence[str] | None) -> list[str]:
    """One or several or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def plain(text: Any) -> str:
    """Text that a card shows as it is: in one line, with nothing that Markdown or HTML would take for its own."""
    line = " ".join(str(text).split())
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), line)


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id, and is no path of this machine."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def base_model_id(finetuned_from: str | None, model: torch.nn.Module) -> str | None:
    """The Hub id of the weights that training started from; `None` where they came from a folder.

    A folder that is gone by now looks like an id. What is told apart by it: an id that was downloaded has a commit or
    stands in the cache, and the first part of a path is often a folder that is still here.
    """
    config = getattr(model, "config", None)
    name = finetuned_from or getattr(config, "_name_or_path", None)
    if name is None or not is_hub_id(name):
        return None
    if getattr(config, "_commit_hash", None) or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    organisation, slash, _ = name.partition("/")
    return name if slash and not os.path.exists(organisation) else None


def known_data_sets(
    trainer: Trainer, ids: list[str], names: list[str], configs: Sequence[str | None]
) -> list[dict[str, str | None]]:
    """Each data set; what nobody said about them is taken from the evaluation data."""
    held = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    info, split = getattr(held, "info", None), getattr(held, "split", None)
    loaded_as = getattr(info, "dataset_name", None)
    if not ids and not names and loaded_as and loaded_as not in _FILE_FORMATS:
        names, configs = [loaded_as], [getattr(info, "config_name", None)]
    found = []
    for hub_id, name, config in islice(zip_longest(ids, names, configs), max(len(ids), len(names))):
        shown = name if name and not _is_path(name) else Path(name or hub_id).name
        hub_id = hub_id if is_hub_id(hub_id) else None
        kind = hub_id or shown.lower().replace(" ", "-")
        found.append(
            {"id": hub_id, "type": kind, "name": shown, "config": config, "split": str(split) if split else None}
        )
    return found


def _is_path(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "~", "/"))


def hub_tasks(model: torch.nn.Module, given: str | list[str] | None) -> list[str]:
    """The Hub's names of what the model does; those that are given, else from its class."""
    base = getattr(model, "get_base_model", None)
    kind = type(base() if base is not None and hasattr(model, "peft_config") else model).__name__
    return listed(given) or [task for ending, task in _TASKS.items() if kind.endswith(ending)]


def eval_results(rows: list[dict[str, float]], tasks: list[str], data_sets: list[dict]) -> list[EvalResult]:
    """The last evaluation's metrics for the model index; the loss alone where there is nothing else."""
    metrics = evaluation_metrics(last_evaluation(rows))
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
            metric_name=readable(name),
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def write_eval_results(folder: Path, results: Sequence[EvalResult], data_sets: Sequence[Mapping[str, Any]]) -> None:
    """The first metric as `.eval_results/<data set>.yaml`, which the Hub shows on the data set's page too.

    Nothing where the data set is not one of the Hub, or huggingface_hub is too old to know the format.
    """
    benchmark = data_sets[0] if data_sets else {}
    if not results or not benchmark.get("id"):
        return
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError:
        return
    first = results[0]
    split = f", split {first.dataset_split}" if first.dataset_split else ""
    entry = EvalResultEntry(
        dataset_id=benchmark["id"],
        task_id=benchmark["config"] or "default",
        value=first.metric_value,
        notes=f"{first.metric_name}{split}",
    )
    path = folder / ".eval_results" / f"{benchmark['id'].replace('/', '_')}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
