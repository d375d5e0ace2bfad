"""A comparison as pictures and as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_efcp.compare import Outcome, loss_key, table
from hf_efcp.plot import bars, new_figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: left; }
th { border-bottom: 2px solid #444; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
"""


def write_comparison(outcomes: Sequence[Outcome], folder: Path) -> tuple[Path, Path]:
    """Write `compare.png`, the losses, and `compare.html`, with the table, all pictures and how the runs were made.

    Returns:
        The two paths.
    """
    losses = loss_figure(outcomes)
    picture, page = folder / "compare.png", folder / "compare.html"
    losses.savefig(picture, format="png", dpi=110)
    memory = bars({o.entrant.label: o.bytes_per_parameter for o in outcomes}, unit="bytes per parameter")
    seconds = bars({o.entrant.label: 1000 * o.seconds_per_step for o in outcomes}, unit="ms per step")
    figures = [
        ("Loss over the steps", "mean over the seeds, and the range between them", losses),
        ("Memory of the optimizers", "all tensors that they keep between steps", memory),
        ("Time of a step", "median of forward, backward and update, without evaluation", seconds),
    ]
    page.write_text(page_text(outcomes, figures), encoding="utf-8")
    return picture, page


def loss_figure(outcomes: Sequence[Outcome]) -> Any:
    """Training and validation loss over the steps, a curve with its range for each optimizer."""
    titles = {"loss": "training loss", "eval_loss": "validation loss"}
    keys = [key for key in titles if all(len(o.curve(key)) > 1 for o in outcomes)] or [loss_key(outcomes)]
    figure = new_figure(5.2 * len(keys), 3.8)
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for outcome in outcomes:
            steps, means, lowest, highest = zip(*outcome.curve(key), strict=True)
            (line,) = axis.plot(steps, means, label=outcome.entrant.label, marker="." if len(steps) < 30 else None)
            axis.fill_between(steps, lowest, highest, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(title=titles[key], xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def page_text(outcomes: Sequence[Outcome], figures: Sequence[tuple[str, str, Any]]) -> str:
    """The page; everything that a run says is escaped."""
    header, *rows = table(outcomes)
    first = outcomes[0].runs[0]
    seeds = ", ".join(str(run["seed"]) for run in outcomes[0].runs)
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(o.runs[0]["learning_rate"] for o in outcomes))
    commands = "\n".join(outcome.runs[0]["command"] or "" for outcome in outcomes)
    shown = "\n".join(
        f"<figure><img src='data:image/png;base64,{_encoded(figure)}' alt='{html.escape(title, quote=True)}'>"
        f"<figcaption>{html.escape(title)}: {html.escape(what)}.</figcaption></figure>"
        for title, what, figure in figures
    )
    title = " and ".join(outcome.entrant.label for outcome in outcomes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>The same script, the same seeds ({html.escape(seeds)}), learning rate {html.escape(rates)};
{first["n_parameters"]:,} parameters, on {html.escape(first["hardware"])}.</p>
<table>
<thead>{_row(header, "th")}</thead>
<tbody>
{"".join(_row(row, "td") for row in rows)}</tbody>
</table>
{shown}
<h2>How to repeat it</h2>
<pre>{html.escape(commands)}</pre>
</body>
</html>
"""


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _encoded(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return base64.b64encode(content.getvalue()).decode()
