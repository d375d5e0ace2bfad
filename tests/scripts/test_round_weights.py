"""The comparison of roundings: tiny runs that go on where they ended, and the table of known ones."""

import json

import round_weights


def test_runs_go_on_where_they_ended(tmp_path, capsys):
    words = ["--rates", "1e-3", "--seeds", "0", "--steps", "8"]  # in 2 both roundings may end alike
    files = ["--file", str(tmp_path / "runs.jsonl"), "--picture", str(tmp_path / "runs.png")]
    round_weights.main([*words, *files])
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    round_weights.main([*words, *files])
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    exact, drawn, nearest = (json.loads(line) for line in lines)
    assert [run["arm"] for run in (exact, drawn, nearest)] == list(round_weights.ARMS)
    assert len({tuple(run["loss"]) for run in (exact, drawn, nearest)}) == 3
    assert (tmp_path / "runs.png").stat().st_size
    assert "| `efcp_mfac` | 0.001 | float32 | 1 |" in capsys.readouterr().out


def test_the_table_has_means_and_spread():
    run = {"arm": "float32", "optimizer": "efcp_mfac", "learning_rate": 1e-4, "loss": [2.0, 1.0], "metric": [0.1, 0.5]}
    table = round_weights.table([run, {**run, "loss": [2.0, 2.0]}])
    assert "| `efcp_mfac` | 0.0001 | float32 | 2 | 1.500 ± 0.707 | 50.0 ± 0.0 |" in table
