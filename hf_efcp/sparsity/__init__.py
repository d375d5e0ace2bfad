"""Sparse training: masks, the rules that change them, and AGENT's correction of the gradient. Needs torch alone."""

from hf_efcp.sparsity.coefficient import AgentCoefficient
from hf_efcp.sparsity.correction import CorrectionOptions, GradientCorrection
from hf_efcp.sparsity.distribution import nonzero_counts
from hf_efcp.sparsity.maskable import Maskable, maskable_parameters
from hf_efcp.sparsity.methods import METHODS, SparseMethod, sparse_method
from hf_efcp.sparsity.sparsifier import Sparsifier
from hf_efcp.sparsity.variance import VarianceProbe

__all__ = [
    "METHODS",
    "AgentCoefficient",
    "CorrectionOptions",
    "GradientCorrection",
    "Maskable",
    "SparseMethod",
    "Sparsifier",
    "VarianceProbe",
    "maskable_parameters",
    "nonzero_counts",
    "sparse_method",
]
