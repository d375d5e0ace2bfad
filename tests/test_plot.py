"""`hf-efcp plot`: every curve that the log has, in one PNG; and one line where there is none."""

import json
import math
import sys

import pytest
from PIL import Image

from hf_efcp.cli import main
from hf_efcp.plot import PANELS, curves, draw, plot_run, read_log

HISTORY = [
    {
        "step": step, "epoch": 0.1 * step, "loss": 2.0 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0,
        "optim_eigenvalue_1": 3.0, "optim_eigenvalue_2": 1.0, "optim_preconditioning_cosine": 0.9,
        "optim_skipped_steps": 0.0,
    }
    for step in range(1, 9)
]  # fmt: skip
HISTORY.append({"step": 8, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 1.0, "eval_samples_per_second": 3.0})


def write(folder, history=HISTORY, step=8):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))


def test_the_command_writes_a_picture_and_prints_where(tmp_path, capsys):
    write(tmp_path / "run" / "checkpoint-8")
    assert main(["plot", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "log.png"
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1200
        assert image.convert("L").getextrema() == (0, 255)  # no blank page


def test_output_may_be_elsewhere_and_has_any_name(tmp_path):
    write(tmp_path)
    output = tmp_path / "pictures" / "curves"
    assert plot_run(tmp_path, output) == output
    assert output.read_bytes().startswith(b"\x89PNG")


def test_panels_hold_the_values_of_the_log():
    shown = [panel for panel in PANELS if curves(panel, HISTORY)]
    figure = draw(shown, HISTORY, title="a run")
    axes = {axis.get_title(): axis for axis in figure.axes}
    loss, eigenvalues = axes["loss"], axes["eigenvalues of GGᵀ"]
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    assert list(loss.lines[0].get_ydata()) == [entry["loss"] for entry in HISTORY[:-1]]
    assert list(loss.lines[0].get_xdata()) == list(range(1, 9))
    assert loss.get_yscale() == axes["learning rate"].get_yscale() == "linear"
    assert [line.get_label() for line in eigenvalues.lines] == ["λ1", "λ2"]
    assert "effective rank of GGᵀ" not in axes


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([9.0, 1.0], "linear"),
        ([10.0, 1.0], "log"),
        ([10.0, 0.0, 1.0], "log"),
        ([10.0, -1.0], "linear"),
        ([0.0], "linear"),
    ],
)
def test_an_axis_counts_decades_where_there_are_some(values, scale):
    history = [{"step": step, "optim_eigenvalue_1": value} for step, value in enumerate(values, start=1)]
    (axis,) = draw([PANELS[3]], history, title="").axes
    assert axis.get_yscale() == scale
    if scale == "log":
        assert 0 < axis.get_ylim()[0] < 1.0 < 10.0 < axis.get_ylim()[1]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_every_entry_alone_is_a_curve(panel):
    for key in panel.keys:
        assert curves(panel, [{"step": 1, key: 0.5}, {"step": 2, key: 0.25}]) == [
            (panel.keys[key], [1, 2], [0.5, 0.25])
        ]


def test_metrics_of_the_validation_are_drawn_without_timings(tmp_path, monkeypatch):
    write(tmp_path)
    drawn = []
    monkeypatch.setattr(
        "hf_efcp.plot.draw", lambda panels, *args, **kwargs: drawn.extend(panels) or draw(panels, *args, **kwargs)
    )
    plot_run(tmp_path)
    assert drawn[1].keys == {"eval_accuracy": "accuracy"}


def test_values_that_are_not_finite_or_negative_do_no_harm(tmp_path):
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": -1.0}, {"step": 3, "loss": 2.0}]
    write(tmp_path, history)
    ((_, steps, values),) = curves(PANELS[0], read_log(tmp_path)[1])
    assert (steps, values) == ([2, 3], [-1.0, 2.0])
    plot_run(tmp_path)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"checkpoint-8": 8, "checkpoint-12": 12, "checkpoint-100": 100}, "checkpoint-100"),
        ({".": 100, "checkpoint-100": 100}, "."),
        ({".": 50, "checkpoint-100": 100}, "checkpoint-100"),
    ],
)
def test_the_log_that_reaches_furthest_is_read(steps, expected, tmp_path):
    for name, step in steps.items():
        write(tmp_path / name, step=step)
    assert read_log(tmp_path)[0] == tmp_path / expected / "trainer_state.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No trainer_state.json in"),
        ("{", "is no state of a Trainer"),
        ("[]", "is no state of a Trainer"),
        ('{"log_history": 3}', "is no state of a Trainer"),
        ('{"log_history": []}', "holds 0 log entries and none to draw"),
        ('{"log_history": [{"step": 1, "train_runtime": 2.0}]}', "holds 1 log entries and none to draw"),
    ],
)
def test_a_folder_without_a_log_is_told_in_one_line(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_missing_folder_is_told(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "nothing")]) == 2
    assert "No trainer_state.json in" in capsys.readouterr().err


def test_without_matplotlib_the_pip_line_is_printed(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "pip install 'hf-efcp[hf]'" in capsys.readouterr().err
