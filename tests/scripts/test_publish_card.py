"""What `publish_card.py` keeps of a run."""

import pytest
from publish_card import publish


def test_card_log_and_pictures_are_kept_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    for name in ("README.md", "trainer_state.json", "figures/loss.png", "model.safetensors"):
        (run / name).write_text(name)
    target = publish(run, "mine", tmp_path / "cards")
    kept = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert kept == {"README.md", "trainer_state.json", "figures/loss.png"}


def test_a_run_without_a_log_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json"):
        publish(tmp_path, "mine", tmp_path / "cards")
