"""`hf-efcp`: what the optimizers are and take and cost, training with them, the curves of a run, and comparisons."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_efcp.optim.options import Option
from hf_efcp.optim.registry import OptimizerSpec, get_spec, list_optimizers, load_optimizers

_WIDTH = 100  # columns of the texts


def list_text() -> str:
    """Every registered optimizer: name, summary, paper."""
    specs = [get_spec(name) for name in list_optimizers()]
    indent = 2 + max(len(spec.name) for spec in specs)
    lines = []
    for spec in specs:
        lines += _wrapped(spec.summary, first=spec.name.ljust(indent), rest=" " * indent)
        lines += _wrapped(spec.paper, first=" " * indent, rest=" " * indent)
    return "\n".join([*lines, "", "hf-efcp explain NAME lists the options of one."])


def explain_text(name: str) -> str:
    """All that a user can set on an optimizer, and how.

    Raises:
        ValueError: no such optimizer; names the closest match.
    """
    spec = get_spec(name)
    parts = [_wrapped(f"{spec.name}: {spec.summary}"), [f"Paper: {spec.paper}"]]
    if spec.fixed:
        parts[1].append(f"Fixed in this name: {_assignments(spec.fixed)}")
    if spec.renames:
        parts[1].append("Also understood: " + ", ".join(f"{old} = {new}" for old, new in spec.renames.items()))
    parts.append(_option_lines(spec))
    parts.append(_preset_lines(spec))
    parts.append(_usage_lines(spec))
    return "\n\n".join("\n".join(part) for part in parts if part)


def _option_lines(spec: OptimizerSpec) -> list[str]:
    """Two lines an option: `name  type  default  range`, and what it means and where it comes from."""
    header = ("option", "type", "default", "range")
    options = spec.options()
    rows = [
        (o.name, f"{o.kind.__name__} or none" if o.optional else o.kind.__name__, _word(default), _range(o))
        for o, default in options.values()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    lines = [aligned(header)]
    for row, (option, _) in zip(rows, options.values(), strict=True):
        source = f" [{option.source}]" if option.source else ""
        lines += [aligned(row), *_wrapped(option.help + source, first="    ", rest="    ")]
    return lines


def _preset_lines(spec: OptimizerSpec) -> list[str]:
    lines = []
    for preset, values in spec.presets.items():
        shown = {name: value for name, value in values.items() if name not in spec.fixed}
        lines += _wrapped(_assignments(shown, ", "), first=f"preset={preset}: ", rest="    ")
    return lines


def _usage_lines(spec: OptimizerSpec) -> list[str]:
    examples = {name: default for name, (_, default) in spec.options().items() if default is not None}
    chosen = dict(list(examples.items())[:2])
    arguments = f"--optim {spec.name}" + (f" --optim_args {_assignments(chosen)}" if chosen else "")
    keywords = "".join(f", {name}={value!r}" for name, value in chosen.items())
    rates = "Learning rate and weight decay have their own flags: --learning_rate, --weight_decay."
    if spec.takes_lr:
        rates += " `lr` may stand among the options too."
    return [
        rates,
        f"Command line: hf-efcp run SCRIPT.py ... {arguments}",
        f'In code:      create_optimizer("{spec.name}", model, lr=1e-3{keywords})',
    ]


def _range(option: Option) -> str:
    return option.allowed.removeprefix("in ").removesuffix(" or none")


def _word(value: Any) -> str:
    """A value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _assignments(values: Any, separator: str = ",") -> str:
    return separator.join(f"{name}={_word(value)}" for name, value in values.items())


def _wrapped(text: str, first: str = "", rest: str = "    ") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _explain(arguments: argparse.Namespace) -> str:
    if arguments.model is None:
        return explain_text(arguments.name)
    with _quiet_transformers("explain --model"):
        from hf_efcp.optim.optim_args import parse_optim_args
        from hf_efcp.treatment import treatment_text

        options = parse_optim_args(arguments.optim_args)
        return treatment_text(arguments.model, arguments.name, options, model_class=arguments.model_class)


def _memory(arguments: argparse.Namespace) -> str:
    with _quiet_transformers("memory"):
        from hf_efcp.memory import memory_text
        from hf_efcp.optim.optim_args import parse_optim_args

        return memory_text(
            arguments.model,
            arguments.optim,
            parse_optim_args(arguments.optim_args),
            model_class=arguments.model_class,
            dtype=arguments.dtype,
            device=arguments.device,
            world_size=arguments.world_size,
        )


@contextmanager
def _quiet_transformers(command: str) -> Iterator[None]:
    """What transformers has to say about a config is not what was asked."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"hf-efcp {command} needs transformers: pip install 'hf-efcp[hf]'") from None
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _plot(arguments: argparse.Namespace) -> str:
    from hf_efcp.plot import plot_run

    return str(plot_run(arguments.folder, arguments.output))


def _compare(arguments: argparse.Namespace) -> str:
    from hf_efcp.compare import Entrant, aligned, compare, table

    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("hf-efcp compare needs transformers and matplotlib: pip install 'hf-efcp[hf]'")
    from hf_efcp.compare_page import write_comparison

    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise ValueError(f"`--seeds` must be whole numbers such as 0,1,2, got {arguments.seeds!r}.") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"`--seeds` must be different numbers from 0 on, got {arguments.seeds!r}.")
    entrants = [Entrant.parse(text) for text in arguments.optim or ["efcp_mfac"]]
    launcher = [word for path in arguments.optimizers for word in ("--optimizers", path)]
    folder = Path(arguments.output)
    outcomes = compare(arguments.script, entrants, seeds, folder, launcher=launcher)
    picture, page = write_comparison(outcomes, folder)
    return f"{aligned(table(outcomes))}\n\npicture: {picture}\npage:    {page}"


class _Parser(argparse.ArgumentParser):
    """With the options that every subcommand has."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        self.add_argument(
            "--optimizers",
            action="append",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="a Python file that registers optimizers of yours",
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-efcp", description=str(__doc__).replace("`", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the optimizers: name, summary, paper")
    listing.set_defaults(text=lambda arguments: list_text())
    explain = commands.add_parser("explain", help="every option of an optimizer, or how it treats a model's parameters")
    explain.add_argument("name", metavar="NAME", help="as `hf-efcp list` prints it")
    explain.add_argument("--model", metavar="MODEL", help="how each parameter of it is treated, and why; as for memory")
    explain.add_argument("--model_class", metavar="CLASS", help="of transformers, instead of the config's")
    explain.add_argument("--optim_args", metavar="name=value,...", help="options, which may change the treatment")
    explain.set_defaults(text=_explain)
    _add_memory(commands)
    plot = commands.add_parser("plot", help="the log of a run as curves, in a PNG")
    plot.add_argument("folder", metavar="RUN_DIR", help="output_dir of the run, or one of its checkpoints")
    plot.add_argument("--output", metavar="PNG", help="the picture, by default RUN_DIR/log.png")
    plot.set_defaults(text=_plot)
    _add_compare(commands)
    # `run` never reaches this parser, which would take the script's own flags for itself.
    commands.add_parser("run", help="a training script with these optimizers under --optim: run SCRIPT.py ...")
    return parser


def _add_memory(commands: Any) -> None:
    memory = commands.add_parser(
        "memory",
        help="what a model and an optimizer will hold, without allocating it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    told = "Hub id, local folder, config.json or model type (bert)"
    memory.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=told)
    memory.add_argument("--model", metavar="MODEL", help="the same")
    memory.add_argument("--optim", required=True, metavar="NAME", help="as `hf-efcp list` prints it")
    memory.add_argument("--optim_args", metavar="name=value,...", help="its options, as for training")
    memory.add_argument("--model_class", metavar="CLASS", help="of transformers, instead of the config's")
    memory.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights, if not the config's"
    )
    memory.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where training will run")
    memory.add_argument("--world_size", type=int, nargs="+", default=[1], metavar="N", help="processes; or several")
    memory.set_defaults(text=_memory)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="AdamW and other optimizers on a training script, with the same seeds: table, picture, page",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument(
        "--optim",
        action="append",
        metavar="NAME[:k=v,...]",
        help="an optimizer beside adamw_torch, efcp_mfac if none is given; repeat it for several",
    )
    compare.add_argument("--seeds", default="0", metavar="N,N,...", help="of every optimizer")
    compare.add_argument("--output", default="compare", metavar="DIR", help="for the runs, compare.png, compare.html")
    compare.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT.py ...",
        help="a script with a Trainer and its arguments, without --optim, --seed and --output_dir",
    )
    compare.set_defaults(text=_compare)


def _are_the_launchers(words: Sequence[str]) -> bool:
    """Whether options that the launcher has too stand before a `run`, so that it is the command."""
    options = "".join(f"{word}\0" for word in words)
    return re.fullmatch(r"(--debug\0|--optimizers[=\0][^\0]+\0)*", options) is not None


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code; a wrong command line exits with 2 and one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no λ still gets the text
    if "run" in argv and _are_the_launchers(argv[: argv.index("run")]):
        from hf_efcp.run import main as run

        place = argv.index("run")
        return run([*argv[:place], *argv[place + 1 :]]) or 0
    arguments = _parser().parse_args(argv)
    arguments.optimizers = getattr(arguments, "optimizers", [])
    try:
        for path in arguments.optimizers:
            load_optimizers(path)
        text = arguments.text(arguments)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if getattr(arguments, "debug", False):
            raise
        print(f"hf-efcp: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough: `hf-efcp list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
