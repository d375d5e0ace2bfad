"""Share of predictions that equal the reference; `evaluate.load("accuracy")` finds it here, off line."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": label, "references": label})
        )

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(p == r for p, r in pairs) / len(pairs)}
