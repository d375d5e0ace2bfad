"""Second-order optimizers for Hugging Face: EFCP, SINGD, Sketchy and AGENT behind one flag."""

from hf_efcp.optim.registry import create_optimizer, list_optimizers

__version__ = "0.1.0"
__all__ = ["create_optimizer", "list_optimizers"]
