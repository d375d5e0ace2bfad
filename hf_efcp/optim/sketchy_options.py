"""Options of SketchyShampoo."""

from __future__ import annotations

from hf_efcp.optim.options import SHARD_STATE, Option
from hf_efcp.optim.rounding import WEIGHT_ROUNDING

_SKETCHY = "Sketchy, arXiv 2302.03764"
_HERE = "this package"

SHAMPOO_OPTIONS = (
    Option("lr", float, "learning rate", low=0),
    Option(
        "rank", int, "directions k kept of each axis; shorter axes are kept whole", low=1, high=65536, source=_SKETCHY
    ),
    Option(
        "beta2", float, "decay of sketches and grafting moments; 1 sums", low=0, low_open=True, high=1, source=_SKETCHY
    ),
    Option("epsilon", float, "ε added to the sketch's eigenvalues", low=0, source="precondition"),
    Option("relative_epsilon", bool, "ε in units of the largest eigenvalue", source="precondition"),
    Option("update_freq", int, "steps between updates of the sketches", low=1, high=1_000_000, source=_SKETCHY),
    Option("warm_steps", int, "first steps that all update the sketches", low=0, high=1 << 30, source=_HERE),
    Option("beta2_per_step", bool, "β₂ to the power update_freq at each update, so that it counts steps", source=_HERE),
    Option(
        "sketch_update",
        str,
        "frequent directions exactly, or by one block power step",
        choices=("exact", "subspace"),
        source=_HERE,
    ),
    Option(
        "tail_decay",
        str,
        "decay of the escaped mass: β₂, or √β₂ to compare with published code",
        choices=("linear", "sqrt"),
        source=_SKETCHY,
    ),
    Option(
        "tail",
        str,
        "what stands for the directions not kept: the bound ρ, or their mean by the trace",
        choices=("rho", "trace"),
        source=_HERE,
    ),
    Option(
        "grafting",
        str,
        "whose length a tensor's step has",
        choices=("none", "sgd", "rmsprop", "adafactor", "rms"),
        source="Shampoo, arXiv 2002.09018",
    ),
    Option(
        "scaling",
        str,
        "whether the grafted step is divided by the roots of its rows' and columns' mean squares",
        choices=("none", "adafactor"),
        source=_HERE,
    ),
    Option(
        "momentum", float, "heavy-ball factor, after grafting", low=0, high=1, high_open=True, source="precondition"
    ),
    Option("nesterov", bool, "Nesterov's momentum", source="precondition"),
    Option("ema", bool, "momentum averages updates, where heavy ball sums them", source="precondition"),
    Option("cautious", bool, "steps without what goes up the gradient", source="arXiv 2411.16085"),
    Option("weight_decay", float, "decoupled weight decay, times lr", low=0, source="AdamW, arXiv 1711.05101"),
    Option(
        "block_size", int, "cut axes into blocks of this length", low=1, high=1 << 30, optional=True, source="Shampoo"
    ),
    Option("max_dim", int, "longer axes get no sketch: vocabularies", low=1, high=1 << 30, source="precondition"),
    Option("one_sided", bool, "sketch only the shortest axis", source=_HERE),
    Option(
        "start_preconditioning_step",
        int,
        "steps that are the grafting rule's own",
        low=0,
        high=1 << 30,
        source="precondition",
    ),
    Option("sketch_dtype", str, "dtype of the directions", choices=("float32", "bfloat16", "float64"), source=_HERE),
    Option("momentum_dtype", str, "dtype of the momentum", choices=("float32", "bfloat16"), source=_HERE),
    SHARD_STATE,
    WEIGHT_ROUNDING,
)
