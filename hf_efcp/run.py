"""Run an unmodified Hugging Face script with the optimizers of hf_efcp.

    python -m hf_efcp.run [options] script.py [its arguments]
    python -m hf_efcp.run [options] -m module [its arguments]
    torchrun --nproc_per_node 2 -m hf_efcp.run [options] script.py …
    accelerate launch -m hf_efcp.run [options] script.py …

The script's `--optim` then takes every name that `--list` prints, and `--optim_args` their options.

options:
  --list                     print the optimizers and leave
  --explain NAME             print the options of an optimizer and leave
  --patch-adamw NAME[:k=v,…] replace torch.optim.AdamW by this optimizer, for scripts without a Trainer; learning
                             rate, weight decay and parameter groups stay the script's
  --trainer efcp             the default: transformers.Trainer is hf_efcp.train.EfcpTrainer, which restores renamed
                             weights (a ViT's encoder) when it resumes and writes the optimizer into the model card
  --trainer transformers     leave transformers.Trainer as it is
  --optimizers FILE          optimizers of yours, which this Python file registers
  --record FILE              let a Trainer write its log, its optimizer's bytes and its seconds per step to this JSON
  --metrics                  let a Trainer log how the curvature shapes the steps: spectrum, scaling, rotation, residual
  --sparsity S               let every Trainer train with this share of the weights at 0, from the first step on
  --sparse_method NAME       static, set, rigl (the default), rigl_itop, set_itop, snfs or gmp
  --sparse_args K=V,…        settings of the method and the masks: interval, rate, include, exclude, initial, …
  --gradient_correction agent  let every Trainer correct its gradients as AGENT does, sparse or not
  --correction_args K=V,…    settings of it: coefficient, gamma, refresh, full_grad_batches, …
  --adversary NAME[:K=V,…]   let every Trainer train on adversarial images: fgsm or pgd
  --debug                    show where an error of hf_efcp comes from; those of the script are always shown whole
  --help                     print this and leave
"""

from __future__ import annotations

import importlib.util
import linecache
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_efcp.optim.options import closest
from hf_efcp.optim.registry import load_optimizers

_SPARSE = (
    *("--sparsity", "--sparse_method", "--sparse_args"),
    *("--gradient_correction", "--correction_args", "--adversary"),
)
_VALUED = ("--explain", "--patch-adamw", "--trainer", "--optimizers", "--record", *_SPARSE)
_OPTIONS = ("--list", "--metrics", "--debug", "--help", "-h", "-m", *_VALUED)


@dataclass
class Command:
    """A parsed command line of the launcher."""

    texts: list[Callable[[], str]] = field(default_factory=list)
    patch_adamw: str | None = None
    trainer: str | None = None
    optimizers: list[str] = field(default_factory=list)
    record: str | None = None
    metrics: bool = False
    debug: bool = False
    sparse: dict[str, str] = field(default_factory=dict)
    module: bool = False
    script: list[str] = field(default_factory=list)


def parse(argv: Sequence[str]) -> Command:
    """Read launcher options up to the script; what follows is the script's. Raises `ValueError`."""
    command, words = Command(), list(argv)
    while words and words[0].startswith("-") and not command.module:
        name, equals, value = words.pop(0).partition("=")
        if name not in _OPTIONS:
            raise ValueError(f"no launcher option `{name}`.{closest(name, _OPTIONS)} Options of the script follow it.")
        if name in _VALUED and not equals:
            if not words:
                raise ValueError(f"`{name}` needs a value.")
            value = words.pop(0)
        if name == "--list":
            command.texts.append(_list_text)
        elif name == "--explain":
            command.texts.append(lambda optimizer=value: _explain_text(optimizer))
        elif name in ("--help", "-h"):
            command.texts.append(lambda: str(__doc__))
        elif name in ("--metrics", "--debug"):
            setattr(command, name.removeprefix("--"), True)
        elif name == "--optimizers":
            command.optimizers.append(value)
        elif name == "--record":
            command.record = value
        elif name in _SPARSE:
            command.sparse[name.removeprefix("--")] = value
        elif name == "--patch-adamw":
            command.patch_adamw = value
        elif name == "--trainer":
            if value not in ("efcp", "transformers"):
                raise ValueError(f"`--trainer` must be efcp or transformers, got {value!r}.")
            command.trainer = value
        else:
            command.module = True
    command.script = words
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; what this package refuses leaves with status 2 and one line on stderr."""
    command = Command()
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        for path in command.optimizers:
            load_optimizers(path)
        if command.texts:
            print("\n\n".join(text() for text in command.texts))
            return
        _check_script(command)
        _prepare(command)
    except (ValueError, TypeError, RuntimeError) as error:
        if command.debug:
            raise
        sys.stderr.write(f"hf_efcp.run: {error}\n")
        raise SystemExit(2) from None
    try:
        _run(command)
    except Exception as error:
        if command.debug or not _is_refusal(error):
            raise
        sys.stderr.write(f"hf_efcp.run: {error} (--debug before the script shows where)\n")
        raise SystemExit(2) from None
    _leave_process_group()


def _check_script(command: Command) -> None:
    if not command.script:
        what = "a module after -m" if command.module else "a script"
        raise ValueError(f"give {what} to run, or --list. --help shows how.")
    path = command.script[0]
    if not command.module and not os.path.isfile(path):
        raise ValueError(f"no file {path!r} in {os.getcwd()}. Launcher options come before the script.")


def _prepare(command: Command) -> None:
    if command.patch_adamw is not None:
        from hf_efcp.adamw_patch import patch_adamw

        patch_adamw(command.patch_adamw)
    if importlib.util.find_spec("transformers") is None:
        given = {"--trainer": command.trainer, "--metrics": command.metrics, "--record": command.record}
        given |= {f"--{name}": 1 for name in command.sparse}
        for option, value in given.items():
            if value:
                raise ValueError(f"`{option}` needs transformers: pip install 'hf-efcp[hf]'.")
        return
    import hf_efcp.train

    if command.sparse:
        _prepare_sparse(command)
    if command.trainer != "transformers":
        hf_efcp.train.replace_trainer()
    if command.metrics:
        hf_efcp.train.log_diagnostics()
    if command.record:
        hf_efcp.train.record_runs(command.record)


def _prepare_sparse(command: Command) -> None:
    from hf_efcp.train import train_sparsely
    from hf_efcp.train.adversary import make_adversary

    options: dict[str, Any] = dict(command.sparse)
    if command.trainer == "transformers":
        raise ValueError(f"`--{next(iter(options))}` needs the Trainer of hf_efcp; leave out `--trainer transformers`.")
    if "sparsity" in options:
        try:
            options["sparsity"] = float(options["sparsity"])
        except ValueError:
            raise ValueError(f"`--sparsity` must be a number in [0, 1), got {options['sparsity']!r}.") from None
    if "adversary" in options:
        make_adversary(options["adversary"])
    train_sparsely(**options)


def _run(command: Command) -> None:
    sys.argv[:] = command.script
    if command.module:
        runpy.run_module(command.script[0], run_name="__main__", alter_sys=True)
    else:
        # As `python script.py` does: example scripts import their neighbours.
        sys.path.insert(0, os.path.dirname(os.path.abspath(command.script[0])))
        runpy.run_path(command.script[0], run_name="__main__")


def _is_refusal(error: BaseException) -> bool:
    """Whether a `raise` of this package made it: an option that does not fit, a Hub that takes nothing.

    Errors of the script, and faults that nobody foresaw, keep their traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, line = frames[-1]
    file = frame.f_code.co_filename
    is_ours = file.startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep)
    return is_ours and linecache.getline(file, line).lstrip().startswith("raise ")


def _leave_process_group() -> None:
    """Gloo may abort an interpreter that ends with an open process group, after all the work is done."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _list_text() -> str:
    from hf_efcp.cli import list_text

    return list_text()


def _explain_text(name: str) -> str:
    from hf_efcp.cli import explain_text

    return explain_text(name)


if __name__ == "__main__":
    main()
