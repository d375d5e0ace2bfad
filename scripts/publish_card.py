"""Write cards to `model_cards/`: of a run, with its pictures and its log, or of every published result from its log.

python scripts/demo.py
python scripts/publish_card.py out/demo/model digits-vit-efcp
python scripts/publish_card.py --results    # `bench_quality.py --report` does it too
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from result_cards import CARDS, write_results

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
    parser.add_argument("run", type=Path, nargs="?", help="output_dir of a run with its card")
    parser.add_argument("name", nargs="?", help="of the folder in model_cards/")
    parser.add_argument("--results", action="store_true", help="every result that has a log in scripts/results")
    options = parser.parse_args()
    if options.results == bool(options.run) or bool(options.run) != bool(options.name):
        parser.error("give a run and a name, or --results")
    print(*(write_results() if options.results else [publish(options.run, options.name)]), sep="\n")


if __name__ == "__main__":
    main()
