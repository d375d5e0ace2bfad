"""The registered optimizers. Defaults are the practical ones; `preset=paper` restores the published settings."""

from __future__ import annotations

from hf_efcp.optim.ggt import GGT
from hf_efcp.optim.mfac import MFAC
from hf_efcp.optim.registry import OptimizerSpec, create_optimizer, get_spec, list_optimizers, register
from hf_efcp.optim.singd import SINGD
from hf_efcp.optim.sketchy_adagrad import SketchyAdaGrad
from hf_efcp.optim.sketchy_shampoo import SketchyShampoo

__all__ = ["create_optimizer", "get_spec", "list_optimizers"]

_EFCP = "EFCP: Error Feedback Can Accurately Compress Preconditioners (arXiv 2306.06098)"
_MFAC = "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information (arXiv 2107.03356)"
_GGT = "Efficient Full-Matrix Adaptive Regularization (arXiv 1806.02958)"
_SKETCHY = "Sketchy: Memory-efficient Adaptive Regularization with Frequent Directions (arXiv 2302.03764)"

# Half the bytes for what needs no float32: at window 32 AdamW's 8 bytes per parameter, and the same losses.
_SMALL = {"value_dtype": "bfloat16", "residual_dtype": "bfloat16", "moment_dtype": "bfloat16"}
_SPARSE = {**_SMALL, "block_size": None}
_FULL = {"value_dtype": "float32", "residual_dtype": "float32", "moment_dtype": "float32"}

_SINGD = "Structured Inverse-Free Natural Gradient: Memory-Efficient & Numerically-Stable KFAC (arXiv 2312.05705)"

_PUBLISHED = {"precondition": "compressed", "scaling": "none", "momentum": 0.0, "cautious": False}
# EFCP's GLUE and CIFAR-10 commands: window 1024, no momentum; damping as for BERT.
_PUBLISHED_MFAC = {**_PUBLISHED, "window": 1024, "damping": 5e-5, "damping_mode": "absolute", "damping_warmup": 0}
# EFCP's logistic regression: 100 rows, ε 1e-5, no averaging, no decay.
_PUBLISHED_GGT = {**_PUBLISHED, "window": 100, "eps": 1e-5, "eps_mode": "absolute", "jitter": 1e-6}

# Sketchy's deep learning runs: 256 directions in blocks of 1024, sketched every 10 steps, RMSProp's length of a step.
_PUBLISHED_SHAMPOO = {
    "rank": 256,
    "block_size": 1024,
    "update_freq": 10,
    "beta2_per_step": False,
    "sketch_update": "exact",
    "grafting": "rmsprop",
    "scaling": "none",
    "momentum": 0.9,
    "ema": False,
    "cautious": False,
    "momentum_dtype": "float32",
}

_PUBLISHED_SINGD = {
    "kfac_like": False,
    "damping": 1e-3,
    "damping_mode": "absolute",
    "lr_cov": 1e-2,
    "limit_lr_cov": False,
    "warm_steps": 0,
    "scaling": "none",
}

_TOPK = ("density", "selection", "block_size")
_COMPRESSED = (*_TOPK, "rank", "residual_dtype")

register(
    OptimizerSpec(
        name="efcp_mfac",
        cls=MFAC,
        summary="S-M-FAC: natural gradient over a window of top-k compressed gradients with error feedback",
        paper=_EFCP,
        # Of the mean, which the rows span, curvature turns more than of a gradient; see scripts/bench_quality.py.
        defaults={**_SPARSE, "precondition": "momentum", "damping_warmup": 50, "cautious": True},
        fixed={"compression": "topk"},
        without=("rank",),
        presets={"paper": {**_FULL, **_PUBLISHED_MFAC, "density": 0.01, "block_size": 2048}},
    )
)
register(
    OptimizerSpec(
        name="efcp_mfac_lowrank",
        cls=MFAC,
        summary="LR-M-FAC: natural gradient over a window of low-rank compressed gradients with error feedback",
        paper=_EFCP,
        defaults=_SMALL,
        fixed={"compression": "lowrank"},
        without=_TOPK,
        presets={"paper": {**_FULL, **_PUBLISHED_MFAC, "damping": 1e-4, "rank": 4}},
    )
)
register(
    OptimizerSpec(
        name="efcp_ggt",
        cls=GGT,
        summary="S-GGT: full-matrix AdaGrad over a window of top-k compressed gradients with error feedback",
        paper=_EFCP,
        defaults=_SPARSE,
        fixed={"compression": "topk"},
        without=("rank",),
        presets={"paper": {**_FULL, **_PUBLISHED_GGT, "density": 0.01, "block_size": 2048}},
    )
)
register(
    OptimizerSpec(
        name="efcp_ggt_lowrank",
        cls=GGT,
        summary="LR-GGT: full-matrix AdaGrad over a window of low-rank compressed gradients with error feedback",
        paper=_EFCP,
        defaults=_SMALL,
        fixed={"compression": "lowrank"},
        without=_TOPK,
        presets={"paper": {**_FULL, **_PUBLISHED_GGT, "rank": 4}},
    )
)
register(
    OptimizerSpec(
        name="mfac",
        cls=MFAC,
        summary="M-FAC: natural gradient over a window of whole gradients; 4·window bytes per parameter",
        paper=_MFAC,
        fixed={"compression": "none"},
        without=_COMPRESSED,
        presets={"paper": _PUBLISHED_MFAC},
    )
)
register(
    OptimizerSpec(
        name="ggt",
        cls=GGT,
        summary="GGT: full-matrix AdaGrad over a window of whole gradients; 4·window bytes per parameter",
        paper=_GGT,
        fixed={"compression": "none"},
        without=_COMPRESSED,
        presets={"paper": _PUBLISHED_GGT},
    )
)
register(
    OptimizerSpec(
        name="MFAC",
        cls=MFAC,
        summary="`mfac` with the published settings and the flags printed on the published M-FAC model cards",
        paper=_MFAC,
        defaults={**_PUBLISHED_MFAC, "damping": 1e-6},
        fixed={"compression": "none"},
        without=_COMPRESSED,
        renames={"num_grads": "window", "damp": "damping"},
        takes_lr=True,
    )
)
register(
    OptimizerSpec(
        name="sketchy_shampoo",
        cls=SketchyShampoo,
        summary="S-Shampoo: Shampoo with a frequent-directions sketch of each axis",
        paper=_SKETCHY,
        defaults={
            "rank": 28,  # at 32 the sketches of vectors take a small convolutional network above AdamW's 8 bytes
            "update_freq": 10,
            "sketch_update": "subspace",
            "scaling": "adafactor",
            "momentum": 0.9,
            "ema": True,
            "cautious": True,
            "momentum_dtype": "bfloat16",
        },
        presets={"paper": _PUBLISHED_SHAMPOO},
    )
)
register(
    OptimizerSpec(
        name="sketchy_adagrad",
        cls=SketchyAdaGrad,
        summary="S-AdaGrad: full-matrix AdaGrad with a frequent-directions sketch of the gradient",
        paper=_SKETCHY,
        presets={"paper": {"delta": 0.0, "system": "model"}},
    )
)
register(
    OptimizerSpec(
        name="efcp_singd",
        cls=SINGD,
        summary="SINGD: structured Kronecker factors of the inverse curvature, learned without inverting",
        paper=_SINGD,
        defaults={
            "kfac_like": True,
            "damping": 0.1,
            "damping_mode": "relative",
            "lr_cov": 0.1,
            "limit_lr_cov": True,
            "warm_steps": 10,
            "scaling": "adam",
        },
        presets={"paper": _PUBLISHED_SINGD},
        needs_model=True,
    )
)
register(
    OptimizerSpec(
        name="singd",
        cls=SINGD,
        summary="`efcp_singd` with the published settings: factors start at I, steps as long as they come",
        paper=_SINGD,
        needs_model=True,
    )
)
