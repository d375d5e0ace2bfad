"""Training arguments with one of this package's optimizers as the default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_efcp.optim.optim_args import format_optim_args, parse_optim_args
from hf_efcp.optim.registry import get_spec, list_optimizers
from hf_efcp.train.adversary import make_adversary
from hf_efcp.train.registration import resolve_for_trainer
from hf_efcp.train.sparse_options import sparse_options


@dataclass
class EfcpTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose options of the optimizer may be a dict, and are checked before any data is loaded.

    Args:
        optim (`str`, *optional*, defaults to `"efcp_mfac"`):
            The optimizer: a name of `hf_efcp.list_optimizers()`, or one of transformers' own.
        optim_args (`str` or `dict`, *optional*):
            Its options, as `hf-efcp explain NAME` lists them: a dict in code, `name=value,name=value` or a JSON
            object on a command line. A dict is kept as its JSON text.
        sparsity (`float`, *optional*):
            Share of the weights that is 0, from the first step on; without it the model is dense.
        sparse_method (`str`, *optional*, defaults to `"rigl"` where there is a sparsity):
            How the masks change: `static`, `set`, `rigl`, `rigl_itop`, `set_itop`, `snfs` or `gmp`.
        sparse_args (`str` or `dict`, *optional*):
            Settings of the method and of the masks, see `hf_efcp.sparsity.SparseMethod` and `Sparsifier`; written
            as `optim_args` are.
        gradient_correction (`str`, *optional*, defaults to `"none"`):
            `"agent"` for AGENT's adaptive gradient correction, with or without a sparsity.
        correction_args (`str` or `dict`, *optional*):
            Settings of it, see `hf_efcp.sparsity.CorrectionOptions`.
        adversary (`str`, *optional*):
            `"fgsm"` or `"pgd:epsilon=0.1,steps=7"`: train on adversarial images, see `hf_efcp.train.PGD`.
    """

    optim: OptimizerNames | str = field(
        default="efcp_mfac", metadata={"help": "The optimizer to use. `hf-efcp list` prints those of hf_efcp."}
    )
    optim_args: dict | str | None = field(
        default=None,
        metadata={"help": "Options of the optimizer: name=value,name=value or a JSON object; see `hf-efcp explain`."},
    )
    sparsity: float | None = field(default=None, metadata={"help": "Share of the weights that is 0."})
    sparse_method: str | None = field(
        default=None,
        metadata={"help": "static, set, rigl (where there is a sparsity), rigl_itop, set_itop, snfs or gmp."},
    )
    sparse_args: dict | str | None = field(default=None, metadata={"help": "Settings of it: name=value,… or JSON."})
    gradient_correction: str | None = field(default=None, metadata={"help": "none or agent."})
    correction_args: dict | str | None = field(default=None, metadata={"help": "Settings of it: name=value,… or JSON."})
    adversary: str | None = field(default=None, metadata={"help": "fgsm or pgd, with options after a colon."})

    def __post_init__(self):
        if isinstance(self.optim_args, Mapping):
            self.optim_args = format_optim_args(self.optim_args)
        super().__post_init__()
        name = getattr(self.optim, "value", self.optim)
        if name in list_optimizers():
            resolve_for_trainer(get_spec(name), self.learning_rate, parse_optim_args(self.optim_args))
        sparse_options(self)
        if self.adversary:
            make_adversary(self.adversary)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # `training_args.bin` goes to the Hub with the model and must load where this package is not installed.
        plain = object.__new__(TrainingArguments)
        plain.__dict__.update(self.__dict__)
        return cast("tuple[Any, ...]", plain.__reduce_ex__(1))  # the newer protocols insist on the object's own class
