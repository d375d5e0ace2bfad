"""The benchmark of SINGD: its table, the bytes in it, and what it says where the rival is missing."""

import json

import bench_singd
import pytest
import torch


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def table(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_table_has_each_structure_beside_adamw_with_the_bytes_that_are_counted(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    words = ["bench_singd", "--structures", "diagonal", "--steps", "10", "--batch", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(bench_singd, "has_package", lambda: False)
    bench_singd.main()
    text = capsys.readouterr().out
    assert "The singd package is not installed: pip install --no-deps singd einops einconv" in text
    rows = table(text)
    assert rows.keys() == {("AdamW", ""), ("efcp_singd", "diagonal")}
    assert [rows["AdamW", ""][n] for n in (2, 3)] == ["1.00", "8.00"]
    model = bench_singd.new_model().to("meta")
    (optimizer,) = bench_singd.ours("diagonal", {})(model)
    optimizer.materialize_state()
    counted = optimizer.state_bytes() / sum(p.numel() for p in model.parameters())
    assert rows["efcp_singd", "diagonal"][3] == f"{counted:.2f}"
    due, ordinary = (json.loads(path.read_text())["rows"][1][name] for name in ("due", "ordinary"))
    amortised = json.loads(path.read_text())["rows"][1]["amortised"]
    assert amortised == pytest.approx((due + 9 * ordinary) / 10)


def test_partial_cycles_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_singd", "--steps", "15"])
    with pytest.raises(SystemExit):
        bench_singd.main()
    assert "--steps must be a multiple of 10, got 15" in capsys.readouterr().err
