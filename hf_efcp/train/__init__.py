"""Hugging Face Trainer: importing this package registers every optimizer of `hf_efcp` as a value of `--optim`."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "hf_efcp.train needs transformers: pip install 'hf-efcp[hf]'. The optimizers alone, hf_efcp.optim, do not."
    ) from error

from hf_efcp.train.registration import log_diagnostics, record_runs, register_optimizers

register_optimizers()

from hf_efcp.train.adversary import FGSM, PGD  # noqa: E402
from hf_efcp.train.arguments import EfcpTrainingArguments  # noqa: E402  (its default is a registered name)
from hf_efcp.train.callbacks import EfcpCallback, EfcpMetricsCallback  # noqa: E402
from hf_efcp.train.sparse_options import train_sparsely  # noqa: E402
from hf_efcp.train.trainer import EfcpTrainer, replace_trainer  # noqa: E402

__all__ = [
    "FGSM",
    "PGD",
    "EfcpCallback",
    "EfcpMetricsCallback",
    "EfcpTrainer",
    "EfcpTrainingArguments",
    "log_diagnostics",
    "record_runs",
    "register_optimizers",
    "replace_trainer",
    "train_sparsely",
]
