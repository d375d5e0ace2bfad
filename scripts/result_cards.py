"""A card for each published result, computed from its log alone; `publish_card.py --results` writes them.

A task of the quality benchmark has a card once AdamW has its four learning rates there and an optimizer of this package
has run; sparse training has one. Each says which lines of its log it is made of.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparse_report
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from quality_rivals import BASELINE
from quality_runs import TASKS, read
from quality_tables import Result, entries, mean_and_std, result_of

from hf_efcp.optim.registry import get_spec, list_optimizers
from hf_efcp.plot import bars, new_figure
from hf_efcp.train.callbacks import TAG
from hf_efcp.train.card_metadata import plain

REPOSITORY = Path(__file__).resolve().parents[1]
CARDS, RESULTS = REPOSITORY / "model_cards", REPOSITORY / "scripts" / "results"
EPOCHS = 8  # of the sparse runs that are published
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Subject:
    """A task as the Hub names it, and the model that is trained.

    Args:
        task: the Hub's word for the kind of task.
        data: id of the data set on the Hub, or a name of its own; `config` is the Hub's.
        name: readable name of the data.
        metric: of which `metric` of a record is a value.
        model: in words.
        base_model: id on the Hub of the weights that training starts from.
    """

    task: str
    data: str
    name: str
    metric: str
    model: str
    config: str | None = None
    base_model: str | None = None


def _text(data: str, name: str, metric: str = "accuracy", config: str | None = None, task: str = "text") -> Subject:
    return Subject(f"{task}-classification", data, name, metric, "MiniLM, fine-tuned", config, MINILM)


SUBJECTS = {
    "trec": _text("CogComp/trec", "TREC questions"),
    "cola": _text("nyu-mll/glue", "GLUE CoLA", "matthews_correlation", "cola"),
    "sst2": _text("nyu-mll/glue", "GLUE SST-2", config="sst2"),
    "stsb": _text("nyu-mll/glue", "GLUE STS-B", "pearsonr", "stsb"),
    "rotten_tomatoes": _text("cornell-movie-review-data/rotten_tomatoes", "Rotten Tomatoes"),
    "wnut17": _text("leondz/wnut_17", "WNUT-17", "f1", task="token"),
    "flowers5": Subject(
        "image-classification", "flowers5", "flowers of five kinds", "accuracy", "MobileNetV1 0.25, fine-tuned"
    ),
    "cifar10": Subject("image-classification", "uoft-cs/cifar10", "CIFAR-10 (part)", "accuracy", "a new small ViT"),
    "digits": Subject("image-classification", "scikit-learn-digits", "scikit-learn digits", "accuracy", "a new ViT"),
    "shakespeare": Subject(
        "text-generation", "tiny-shakespeare", "tiny Shakespeare", "accuracy", "a new GPT-2 of characters"
    ),
}


def write_results(cards: Path = CARDS, results: Path = RESULTS) -> list[Path]:
    """Write every card that the logs in `results` are enough for; the cards' paths."""
    records, sparse = read(results / "quality.jsonl"), read(results / "sparse.jsonl")
    written = [write_quality(records, task, cards) for task in TASKS if is_published(records, task)]
    return [*written, write_sparse(sparse, cards)] if sparse else written


def is_published(records: Sequence[Mapping[str, Any]], task: str) -> bool:
    return len(_lines(records, task)) > 1


# ------------------------------------------------------------------ the quality benchmark


def _lines(records: Sequence[Mapping[str, Any]], task: str) -> dict[str, Result]:
    """What the card compares, AdamW first; empty where AdamW lacks a learning rate."""
    found = {}
    for optimizer, choice in entries(records):
        result = result_of(records, task, optimizer, choice)
        if result is not None:
            found[optimizer if choice != "own" or optimizer == BASELINE else f"{optimizer}, own rate"] = result
    return found if BASELINE in found else {}


def write_quality(records: Sequence[Mapping[str, Any]], task: str, cards: Path) -> Path:
    """The card `quality-TASK` in `cards`, with pictures of losses and memory."""
    lines, subject = _lines(records, task), SUBJECTS[task]
    used = [record for result in lines.values() for record in result.records]
    metric = subject.metric.replace("_", " ")
    metadata = _metadata(f"quality-{task}", subject, lines)
    memory = {label: result.records[0]["bytes_per_parameter"] for label, result in lines.items()}
    steps = next(iter(lines.values())).at
    results = [["optimizer", "learning rate", "seeds", "lowest validation loss", f"{metric} at the end"]]
    results += [
        [f"`{label}`", f"{result.rate:g}", str(len(result.records)), mean_and_std(result.lowest, 3),
         mean_and_std([value / 100 for value in result.points], 4)]
        for label, result in lines.items()
    ]  # fmt: skip
    return _write(
        cards / metadata.model_name,
        metadata,
        {
            "loss": losses({label: [r["loss"] for r in result.records] for label, result in lines.items()}, steps),
            "memory": bars(memory, unit="bytes per parameter"),
        },
        about=f"{subject.model[0].upper()}{subject.model[1:]}, on {subject.name}: AdamW at the best of its learning "
        "rates and other optimizers beside it, through the Trainer of hf-efcp.",
        log_file="scripts/results/quality.jsonl",
        log_lines=f"1 to {len(records)}",
        results=results,
        optimizers=[_optimizer(label, result) for label, result in lines.items()],
        log_note="Validation loss over the steps, mean over the seeds.",
        log=[["step", *lines], *_rows(steps, {label: result.curve for label, result in lines.items()})],
        memory=[[f"`{label}`", f"{size:.2f}"] for label, size in memory.items()],
        command=f"python scripts/bench_quality.py --tasks {task} --budget 600\n"
        "python scripts/bench_quality.py --budget 0 --report README.md",
        circumstances=[
            ("hardware", _named(used, "hardware")),
            ("seeds", _named(used, "seed")),
            ("commits", _named(used, "commit")),
            ("steps", _named(used, "steps")),
        ],
    )


def _metadata(name: str, subject: Subject, lines: Mapping[str, Result]) -> ModelCardData:
    of_metric = subject.metric.replace("_", " ")
    return ModelCardData(
        library_name="transformers",
        base_model=subject.base_model,
        datasets=[subject.data] if "/" in subject.data else None,
        tags=[TAG, *dict.fromkeys(label.split(",")[0] for label in lines)],
        pipeline_tag=subject.task,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=subject.task,
                dataset_type=subject.data,
                dataset_name=subject.name,
                dataset_config=subject.config,
                metric_type=subject.metric,
                metric_name=f"{of_metric} with {label}",
                metric_value=round(statistics.mean(result.points) / 100, 6),
            )
            for label, result in lines.items()
        ],
    )


def _optimizer(label: str, result: Result) -> list[str]:
    name = label.split(",")[0]
    paper = get_spec(name).paper if name in list_optimizers() else ""
    return [f"`{name}`", f"{result.rate:g}", "its defaults", plain(paper)]


# ------------------------------------------------------------------ sparse training


def write_sparse(stored: Sequence[Mapping[str, Any]], cards: Path) -> Path:
    """The card `sparse-cifar10` in `cards`: RigL, with AGENT, and for AGENT's compute, of the runs of eight epochs."""
    runs = [run for run in stored if run["of"] == EPOCHS]
    subject = Subject("image-classification", "uoft-cs/cifar10", "CIFAR-10 (part)", "accuracy", "a ResNet")
    keys = {(s, arm): sparse_report.of(runs, s, arm)
            for s in sorted({run["sparsity"] for run in runs}) for arm in sparse_report.LABELS}  # fmt: skip
    lines = {f"{sparse_report.LABELS[arm]}, {s:g}": found for (s, arm), found in keys.items() if found}
    epochs = list(range(1, max(len(run["accuracy"]) for run in runs) + 1))
    curves = {label: _mean_curve([run["accuracy"] for run in found]) for label, found in lines.items()}
    metadata = ModelCardData(
        library_name="transformers",
        datasets=[subject.data],
        tags=[TAG, "sparse-training", "rigl", "agent"],
        pipeline_tag=subject.task,
        model_name="sparse-cifar10",
        eval_results=[
            EvalResult(
                task_type=subject.task, dataset_type=subject.data, dataset_name=subject.name, metric_type="accuracy",
                metric_name=f"accuracy with {label}", metric_value=round(curve[-1], 6),
            )
            for label, curve in curves.items()
        ],
    )  # fmt: skip
    table = [row.strip("| ").split(" | ") for row in sparse_report.table(runs).split("\n\n")[0].splitlines()]
    return _write(
        cards / "sparse-cifar10",
        metadata,
        {"loss": losses({label: [r["accuracy"] for r in found] for label, found in lines.items()}, epochs,
                        title="test accuracy", over="epoch")},
        about="A ResNet of 78 000 parameters on 4000 images of CIFAR-10, 16×16, tested on 2000, from the first step on "
        "with most of its weights at 0: RigL alone, with AGENT's correction of the gradient, and alone for as many "
        "passes as AGENT took.",
        log_file="scripts/results/sparse.jsonl",
        log_lines=f"1 to {len(stored)}",
        results=[table[0], *table[2:]],
        optimizers=[["SGD", "0.1, cosine", "momentum 0.9, Nesterov, weight decay 0.0005",
                     "AGENT: adaptive gradient correction (arXiv 2301.03573); RigL (arXiv 1911.11134)"]],
        log_note="Test accuracy over the epochs, mean over the seeds; method, sparsity.",
        log=[["epoch", *lines], *_rows(epochs, curves)],
        memory=[],
        command="python scripts/train_sparse.py",
        circumstances=[(name + "s" * (name != "hardware"), _named(runs, name))
                       for name in ("hardware", "seed", "commit")],
    )  # fmt: skip


# ------------------------------------------------------------------ both


def losses(
    curves: Mapping[str, Sequence[Sequence[float]]],
    steps: Sequence[int],
    *,
    title: str = "validation loss",
    over: str = "step",
) -> Any:
    """A curve each, mean over the seeds with their range; `steps` is that of the longest."""
    figure = new_figure(6.4, 3.8)
    axis = figure.subplots()
    for label, seeds in curves.items():
        known = [[value for value in values if value is not None] for values in seeds]
        values = list(zip(*known, strict=False))
        mean = [statistics.mean(point) for point in values]
        (line,) = axis.plot(steps[: len(mean)], mean, label=label, marker="." if len(mean) < 30 else None)
        axis.fill_between(steps[: len(mean)], list(map(min, values)), list(map(max, values)), alpha=0.15,
                          color=line.get_color(), linewidth=0)  # fmt: skip
    axis.set(title=title, xlabel=over)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*curves, strict=True)]


def _rows(steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """A row a step, empty where a curve has ended."""
    shown: Callable[[Sequence[float], int], str] = lambda c, i: f"{c[i]:.4g}" if i < len(c) else ""  # noqa: E731
    return [[str(step), *(shown(curve, i) for curve in curves.values())] for i, step in enumerate(steps)]


def _named(records: Sequence[Mapping[str, Any]], field: str) -> str:
    return ", ".join(str(value) for value in sorted({record[field] for record in records}))


def _write(folder: Path, metadata: ModelCardData, figures: Mapping[str, Any], **facts: Any) -> Path:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", format="png", dpi=90)
    template = CARDS / "result_template.md"
    card = ModelCard.from_template(metadata, template_path=str(template), title=metadata.model_name, **facts)
    card.save(folder / "README.md")
    return folder / "README.md"
