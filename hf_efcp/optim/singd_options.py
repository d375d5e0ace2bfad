"""Options of SINGD."""

from __future__ import annotations

from typing import Any

from hf_efcp.curvature.structures import make_structure
from hf_efcp.optim.options import SHARD_STATE, Option
from hf_efcp.optim.rounding import WEIGHT_ROUNDING

_SINGD = "SINGD, arXiv 2312.05705"
_PACKAGE = "the singd package"
_HERE = "this package"
_ADAMW = "AdamW, arXiv 1711.05101"


class PairOption(Option):
    """Two words, for inputs and outputs: `("dense", "diagonal")` in code, `dense+diagonal` or one for both elsewhere.

    The value is one string: groups hold primitives.
    """

    @property
    def allowed(self) -> str:
        return "a name, or two joined by +: of inputs and of outputs"

    def _of_kind(self, value: Any) -> str:
        if isinstance(value, (tuple, list)) and len(value) == 2:
            value = "+".join("none" if word is None else str(word).removeprefix("torch.") for word in value)
        value = super()._of_kind(value)
        words = value.split("+")
        if len(words) > 2:
            raise ValueError(f"`{self.name}` must be {self.allowed}, got {value!r}.")
        for word in words:
            self._check_word(word)
        return "+".join(words * (3 - len(words)))

    def _check_word(self, word: str) -> None:
        raise NotImplementedError


class Structures(PairOption):
    """Structures by name."""

    def _check_word(self, word: str) -> None:
        try:
            make_structure(word, 1)
        except ValueError as error:
            raise ValueError(f"`{self.name}` must be {self.allowed}, got {word!r}. {error}") from None


class Dtypes(PairOption):
    """Dtypes of factors; `none` is the precise one: float32, float64 for float64 weights."""

    words = ("none", "float32", "bfloat16", "float16", "float64")

    def _check_word(self, word: str) -> None:
        if word not in self.words:
            raise ValueError(f"`{self.name}` must be {self.allowed}, of {', '.join(self.words)}; got {word!r}.")


class Rate(Option):
    """A number, or in code a function of the number of steps taken, as the singd package has it."""

    @property
    def allowed(self) -> str:
        return f"{super().allowed}, or a function of the step"

    def check(self, value: Any) -> Any:
        return value if callable(value) else super().check(value)


SINGD_OPTIONS = (
    Option("lr", float, "learning rate", low=0),
    Option(
        "momentum",
        float,
        "heavy-ball factor α₂ of the preconditioned gradient",
        low=0,
        high=1,
        high_open=True,
        source=_SINGD,
    ),
    Option("damping", float, "λ, added to the curvature", low=0, source=_SINGD),
    Option(
        "damping_mode",
        str,
        "λ as it is, or U and V in units of their mean eigenvalues, so that no scale of the loss matters",
        choices=("absolute", "relative"),
        source=_HERE,
    ),
    Option("alpha1", float, "momentum α₁ of the factors' directions", low=0, high=1, high_open=True, source=_SINGD),
    Option("weight_decay", float, "decoupled weight decay, times lr", low=0, source=_ADAMW),
    Option("T", int, "steps between updates of the factors", low=1, high=1_000_000, source=_SINGD),
    Option(
        "loss_average",
        str,
        "what the loss is a mean of; none: it is a sum",
        choices=("batch", "batch+sequence"),
        optional=True,
        source=_PACKAGE,
    ),
    Rate("lr_cov", float, "step β₁ of the factors", low=0, source=_SINGD),
    Structures("structures", str, "structures of the factors of inputs and outputs", source=_SINGD),
    Option(
        "kfac_approx",
        str,
        "rows of layers that share weights over tokens: each token, or one mean a sample",
        choices=("expand", "reduce"),
        source="arXiv 2311.00636",
    ),
    Option("kfac_like", bool, "IKFAC: leave out the factors' influence on each other, and alpha1", source=_SINGD),
    Dtypes("preconditioner_dtype", str, "dtypes of the factors; none is float32", source=_PACKAGE),
    Option(
        "normalize_lr_cov", bool, "divide lr_cov by the largest entry of the direction, if above 1", source=_PACKAGE
    ),
    Option(
        "limit_lr_cov",
        bool,
        "divide lr_cov by the direction's spectral radius, if above 1: no update overshoots",
        source=_HERE,
    ),
    Option(
        "warm_steps",
        int,
        "first steps that all update the factors, the n-th by at least 1/n, the first by 1/2: they start as means",
        low=0,
        high=1_000_000,
        source=_HERE,
    ),
    Option("lr_cov_warmup", int, "updates over which lr_cov rises from 0", low=0, high=1_000_000, source=_HERE),
    Option("warm_start", bool, "start factors at the scale of the first statistics instead of I", source=_HERE),
    Option(
        "max_growth",
        float,
        "largest product of mean traces of KKᵀ and CCᵀ",
        low=0,
        low_open=True,
        optional=True,
        source=_HERE,
    ),
    Option(
        "scaling",
        str,
        "a layer's step: as it comes, of a fixed root mean square, or by Adam's moments of it (no momentum)",
        choices=("none", "layer_rms", "adam"),
        source=_HERE,
    ),
    Option("rms", float, "that root mean square", low=0, low_open=True, source=_HERE),
    Option(
        "max_update_norm",
        float,
        "clip the preconditioned gradient of all layers to this norm",
        low=0,
        low_open=True,
        optional=True,
        source=_HERE,
    ),
    Option(
        "kl_clip",
        float,
        "shorten it by ν until (lr·ν)²·⟨it, gradient⟩ is at most this",
        low=0,
        low_open=True,
        optional=True,
        source="kfac-pytorch",
    ),
    Option("max_dense_dim", int, "dense factors wider than this become diagonal", low=1, high=1 << 30, source=_HERE),
    Option("cache_metrics", bool, "keep KKᵀ, CCᵀ where that makes steps faster: more memory", source=_HERE),
    Option(
        "fallback_lr",
        float,
        "AdamW's rate for all other parameters while `lr` is its first value; none: `lr`",
        low=0,
        optional=True,
        source=_HERE,
    ),
    Option(
        "moment_dtype",
        str,
        "dtype of Adam's moments; the second is rounded stochastically",
        choices=("float32", "bfloat16"),
        source=_HERE,
    ),
    Option("beta1", float, "AdamW's β₁", low=0, high=1, high_open=True, source=_ADAMW),
    Option("beta2", float, "AdamW's β₂", low=0, high=1, high_open=True, source=_ADAMW),
    Option("eps", float, "AdamW's ε", low=0, low_open=True, source=_ADAMW),
    Option("warn_unsupported", bool, "log the parameters that AdamW optimizes", source=_PACKAGE),
    Option(
        "init_grad_scale",
        float,
        "what the loss is multiplied by where no GradScaler is known",
        low=0,
        low_open=True,
        source=_PACKAGE,
    ),
    SHARD_STATE,
    WEIGHT_ROUNDING,
)
