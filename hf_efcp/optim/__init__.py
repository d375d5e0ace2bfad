"""The optimizers, ordinary `torch.optim.Optimizer`s that need torch alone."""

from hf_efcp.optim.mfac import MFAC
from hf_efcp.optim.registry import create_optimizer, get_spec, list_optimizers

__all__ = ["MFAC", "create_optimizer", "get_spec", "list_optimizers"]
