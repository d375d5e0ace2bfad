"""A run's log as curves: loss, learning rate, norms, and what the curvature did, to one PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATE = "trainer_state.json"
_BOOKKEEPING = ("_runtime", "_per_second", "_time", "_flos")
_COLUMNS = 3
_MARKED = 30  # a curve of fewer points shows them
_FLOOR = 1e-9  # of the largest value: what lies below, on a logarithmic axis, is rounding


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    Attributes:
        title: with the unit where there is one.
        keys: entries of the log, each with its label.
        log: whether the axis is logarithmic where the values span a decade and none is negative.
        limits: of the axis, where the quantity has them; the lower one gives way to smaller values.
    """

    title: str
    keys: dict[str, str]
    log: bool = False
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("loss", {"loss": "training", "eval_loss": "validation"}, log=True),
    Panel("learning rate", {"learning_rate": ""}),
    Panel(
        "norms",
        {
            "grad_norm": "gradient, unclipped",
            "optim_gradient_norm": "gradient",
            "optim_update_norm": "update",
            "optim_residual_norm": "residual",
        },
        log=True,
    ),
    Panel("eigenvalues of GGᵀ", {f"optim_eigenvalue_{place}": f"λ{place}" for place in range(1, 9)}, log=True),
    Panel("effective rank of GGᵀ", {"optim_effective_rank": ""}),
    Panel("condition of the m×m system", {"optim_system_condition": ""}, log=True),
    Panel("rotation: cosine of u and g", {"optim_preconditioning_cosine": ""}, limits=(-0.02, 1.02)),
    Panel("scaling: norm of u over norm of g", {"optim_preconditioning_scale": ""}, log=True),
    Panel("norm of residual over norm of gradient", {"optim_residual_over_gradient": ""}),
)


def plot_run(folder: str | Path, output: str | Path | None = None) -> Path:
    """Draw the log of a training run.

    Args:
        folder: of the run, or one of its checkpoints.
        output: the PNG; by default `log.png` in `folder`.

    Returns:
        The picture's path.

    Raises:
        ValueError: no log, an unreadable one, or one with nothing to draw.
        ModuleNotFoundError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    state_file, history = read_log(folder)
    ordered = (PANELS[0], _evaluation(history), *PANELS[1:])
    panels = [panel for panel in ordered if curves(panel, history)]
    if not panels:
        raise ValueError(f"{state_file} holds {len(history)} log entries and none to draw; lower --logging_steps.")
    output = Path(output) if output is not None else Path(folder) / "log.png"
    figure = draw(panels, history, title=Path(folder).resolve().name)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png", dpi=110)
    return output


def read_log(folder: str | Path) -> tuple[Path, list[dict[str, Any]]]:
    """The log history that reaches furthest, of those in `folder` and its checkpoints, and the file that holds it.

    Raises:
        ValueError: there is none, or it is no log of a Trainer.
    """
    folder = Path(folder)
    found = [path for path in (folder / _STATE, *folder.glob(f"checkpoint-*/{_STATE}")) if path.is_file()]
    if not found:
        raise ValueError(
            f"No {_STATE} in {folder} or in a checkpoint below it. Trainer writes it with every checkpoint; "
            "`trainer.save_state()` writes it at the end."
        )
    states = [(_state(path), path) for path in found]
    state, path = max(states, key=lambda pair: pair[0].get("global_step") or 0)  # the first of equals: the folder's
    return path, [entry for entry in state["log_history"] if "step" in entry]


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state["log_history"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no state of a Trainer: it has no `log_history`.") from None
    return state


def curves(panel: Panel, history: Sequence[dict[str, Any]]) -> list[tuple[str, list[int], list[float]]]:
    """Label, steps and values of each curve of `panel` that the log has; a value that is not finite is left out."""
    found = []
    for key, label in panel.keys.items():
        points = [(e["step"], e[key]) for e in history if isinstance(e.get(key), (int, float))]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            found.append((label, list(steps), list(values)))
    return found


def _evaluation(history: Sequence[dict[str, Any]]) -> Panel:
    """The validation metrics, which every task names otherwise."""
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith("eval_"))
    kept = [name for name in names if name != "eval_loss" and not name.endswith(_BOOKKEEPING)]
    return Panel("validation metrics", {name: name.removeprefix("eval_").replace("_", " ") for name in kept})


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches; needs no display. Raises `ModuleNotFoundError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Pictures need matplotlib: pip install 'hf-efcp[hf]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def spectrum_curves(spectra: Mapping[str, Sequence[float]]) -> Any:
    """Eigenvalues over their rank, a curve each, by decades."""
    figure = new_figure(5.6, 3.4)
    axis = figure.subplots()
    for label, values in spectra.items():
        axis.plot(range(1, len(values) + 1), values, label=label, marker="." if len(values) < _MARKED else None)
    axis.set(xlabel="rank", ylabel="eigenvalue")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    _scale_by_decades(axis, [value for values in spectra.values() for value in values])
    axis.legend(fontsize=8, framealpha=0.6)
    return figure


def bars(values: Mapping[str, float], *, unit: str) -> Any:
    """One horizontal bar a value, with its figure."""
    figure = new_figure(5.6, 0.6 + 0.42 * len(values))
    axis = figure.subplots()
    drawn = axis.barh(list(values), list(values.values()), color="#4c78a8")
    axis.bar_label(drawn, labels=[f"{value:,.4g}" for value in values.values()], padding=3, fontsize=8)
    axis.set_xlim(0, 1.25 * max(values.values()))
    axis.set_xlabel(unit)
    axis.invert_yaxis()
    return figure


def draw(panels: Sequence[Panel], history: Sequence[dict[str, Any]], *, title: str) -> Any:
    """A matplotlib figure with one axis for each panel."""
    n_columns = min(_COLUMNS, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = new_figure(4.6 * n_columns, 3.0 * n_rows + 0.4)
    if title:
        figure.suptitle(title)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    last = max(entry["step"] for entry in history)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, curves(panel, history))
        axis.set_xlim(-0.02 * last, 1.02 * last)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _draw_panel(axis: Any, panel: Panel, lines: Sequence[tuple[str, list[int], list[float]]]) -> None:
    for label, steps, values in lines:
        marker = "." if len(steps) < _MARKED else None
        axis.plot(steps, values, label=label, marker=marker, linewidth=1.4)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.3)
    if panel.log:
        _scale_by_decades(axis, [value for _, _, values in lines for value in values])
    if panel.limits:
        low, high = panel.limits
        axis.set_ylim(min(low, *(value for _, _, values in lines for value in values)), high)
    if any(label for label, _, _ in lines):
        axis.legend(fontsize=8, framealpha=0.6)


def _scale_by_decades(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis; an eigenvalue of 0, as an unfilled window has, is then left out of its curve."""
    floor = _FLOOR * max(values)
    shown = [value for value in values if value > floor]
    if min(values) >= 0 and shown and max(shown) >= 10 * min(shown):
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(bottom=0.7 * min(shown), top=1.4 * max(shown))
