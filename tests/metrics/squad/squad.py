"""Exact match and word F1 against the best of the reference answers, in percent."""

from collections import Counter

import datasets
import evaluate


class Squad(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        features = {
            "predictions": {"id": text, "prediction_text": text},
            "references": {"id": text, "answers": answers},
        }
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        said = {p["id"]: p["prediction_text"] for p in predictions}
        pairs = [(said[r["id"]], r["answers"]["text"]) for r in references]
        exact = sum(text in answers for text, answers in pairs) / len(pairs)
        f1 = sum(max(_word_f1(text, answer) for answer in answers) for text, answers in pairs) / len(pairs)
        return {"exact_match": 100 * exact, "f1": 100 * f1}


def _word_f1(text, answer):
    ours, theirs = Counter(text.lower().split()), Counter(answer.lower().split())
    common = sum((ours & theirs).values())
    return 2 * common / max(1, sum(ours.values()) + sum(theirs.values()))
