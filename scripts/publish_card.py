"""Keep the card of a run in `model_cards/`, with its pictures and the log that its figures are from.

python scripts/demo.py
python scripts/publish_card.py out/demo/model digits-vit-efcp
cp out/demo/loss_curves.png model_cards/digits-vit-efcp/figures/   # AdamW's beside it
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

CARDS = Path(__file__).parents[1] / "model_cards"
KEPT = ("README.md", "trainer_state.json", "figures")


def publish(run: Path, name: str, cards: Path = CARDS) -> Path:
    """Copy card, log and pictures of `run` to the folder `name` of `cards`; the folder.

    Raises:
        FileNotFoundError: the run has no card or no log.
    """
    target = cards / name
    for part in KEPT:
        if not (run / part).exists():
            raise FileNotFoundError(f"{run} has no {part}; `create_model_card` and `save_state` write them.")
    target.mkdir(parents=True, exist_ok=True)
    for part in KEPT:
        source = run / part
        if source.is_dir():
            shutil.copytree(source, target / part, dirs_exist_ok=True)
        else:
            shutil.copy(source, target / part)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of a run with its card")
    parser.add_argument("name", help="of the folder in model_cards/")
    options = parser.parse_args()
    print(publish(options.run, options.name))


if __name__ == "__main__":
    main()
