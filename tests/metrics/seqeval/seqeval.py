"""Token-wise scores under the names of seqeval, entities not joined; enough to see a script run to its end."""

import datasets
import evaluate


class TokenScores(evaluate.Metric):
    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": tags, "references": tags})
        )

    def _compute(self, predictions, references):
        pairs = [(p, r) for ps, rs in zip(predictions, references, strict=True) for p, r in zip(ps, rs, strict=True)]
        hits = sum(p == r != "O" for p, r in pairs)
        precision = hits / max(1, sum(p != "O" for p, _ in pairs))
        recall = hits / max(1, sum(r != "O" for _, r in pairs))
        return {
            "overall_precision": precision,
            "overall_recall": recall,
            "overall_f1": 2 * precision * recall / max(1e-12, precision + recall),
            "overall_accuracy": sum(p == r for p, r in pairs) / len(pairs),
        }
