"""The optimizers, ordinary `torch.optim.Optimizer`s that need torch alone; and what one more is made of."""

from hf_efcp.optim.catalog import create_optimizer, get_spec, list_optimizers
from hf_efcp.optim.ggt import GGT
from hf_efcp.optim.mfac import MFAC
from hf_efcp.optim.options import Option, check_options
from hf_efcp.optim.parameterwise import ParameterwiseOptimizer
from hf_efcp.optim.registry import OptimizerSpec, register
from hf_efcp.optim.singd import SINGD
from hf_efcp.optim.sketchy_adagrad import SketchyAdaGrad
from hf_efcp.optim.sketchy_shampoo import SketchyShampoo

__all__ = [
    "GGT",
    "MFAC",
    "SINGD",
    "OptimizerSpec",
    "Option",
    "ParameterwiseOptimizer",
    "SketchyAdaGrad",
    "SketchyShampoo",
    "check_options",
    "create_optimizer",
    "get_spec",
    "list_optimizers",
    "register",
]
