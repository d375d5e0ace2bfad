"""A run's log with what it cost, in one file: what `hf-efcp compare` reads of each run."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efcp.train.run_record import OptimizerRecord, command_line, hardware


class RunRecorder(TrainerCallback):
    """Writes `path` at the end of training and after each evaluation since.

    Its entries: `log_history`; `optimizer`, `options`, `state_bytes`, `n_parameters` measured from the optimizer's
    tensors; `seconds_per_step`, the median over steps of forward, backward and update, without evaluation; `hardware`,
    `seed`, `learning_rate`, `command`.

    Args:
        path: the JSON file; its folder is made.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._seconds: list[float] = []
        self._begin = 0.0
        self._facts: dict[str, Any] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._begin)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        record = OptimizerRecord.of(kwargs["optimizer"], str(getattr(args.optim, "value", args.optim)))
        self._facts = {
            "optimizer": record.name,
            "options": dict(record.options),
            "state_bytes": record.state_bytes,
            "n_parameters": record.n_parameters,
            "seconds_per_step": statistics.median(self._seconds) if self._seconds else None,
            "hardware": hardware(args.device),
            "seed": args.seed,
            "learning_rate": args.learning_rate,
            "command": command_line(),
        }
        self._write(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._facts:
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self._facts, "log_history": state.log_history}), encoding="utf-8")
