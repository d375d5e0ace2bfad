"""Metrics of `evaluate`, or scikit-learn's where the metric's script cannot be had: offline, for instance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

# Names of the Hub's metrics, what they take besides predictions and references, and the same figure computed here.
_METRICS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray, np.ndarray], float]]] = {
    "accuracy": ({}, sklearn_metrics.accuracy_score),
    "f1": ({"average": "macro"}, lambda y, p: sklearn_metrics.f1_score(y, p, average="macro")),
    "matthews_correlation": ({}, sklearn_metrics.matthews_corrcoef),
    "mse": ({}, sklearn_metrics.mean_squared_error),
    "pearsonr": ({}, lambda y, p: stats.pearsonr(y, p).statistic),
    "spearmanr": ({}, lambda y, p: stats.spearmanr(y, p).statistic),
}
NAMES = tuple(_METRICS)


def load_metrics(names: Sequence[str], *, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """What Trainer calls after an evaluation. Prints where each metric comes from.

    Args:
        names: some of `NAMES`; a folder of that name with the metric's script is used before the Hub.
        regression: the prediction is the only logit, not the place of the largest.

    Raises:
        ValueError: a name that is none of `NAMES`.
    """
    unknown = [name for name in names if name not in _METRICS]
    if unknown:
        raise ValueError(f"No metric {', '.join(unknown)}; there are {', '.join(NAMES)}.")
    functions = {name: _load(name) for name in names}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.squeeze(-1) if regression else logits.argmax(-1)
        return {name: function(prediction.label_ids, predicted) for name, function in functions.items()}

    return compute


def _load(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    arguments, local = _METRICS[name]
    try:
        metric = evaluate.load(name)
    except (OSError, ImportError) as error:  # no such file here, no network, or a package that the script needs
        print(f"Metric {name}: computed with scikit-learn and SciPy ({type(error).__name__} from evaluate.load).")
        return lambda references, predictions: float(local(references, predictions))
    print(f"Metric {name}: evaluate's.")

    def computed(references: np.ndarray, predictions: np.ndarray) -> float:
        return float(metric.compute(predictions=predictions, references=references, **arguments)[name])

    return computed
