"""A training script that knows nothing of this package: each optimizer of `OPTIMIZERS`, resumed, and accumulated."""

import os
import sys

import torch
import torch.distributed as dist
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)


def model():
    set_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def language_model():
    """Its loss is the mean over the tokens of a step, however many each text has."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def texts(predicts):
    ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
    if predicts:
        lengths = [3 + i % 9 for i in range(64)]
        labels = [torch.where(torch.arange(12) < n, row, -100) for row, n in zip(ids, lengths, strict=True)]
        return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]


def run(name, folder, resume=None, make=model, **changes):
    data = texts(predicts=make is language_model)
    given = {
        "output_dir": folder, "optim": name, "optim_args": os.environ["OPTIM_ARGS_" + name], "max_steps": 6,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2, "save_strategy": "no",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = Trainer(make(), TrainingArguments(**{**given, **changes}), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    assert dist.get_world_size() == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


results = {"trainer": Trainer.__module__}
for name in os.environ["OPTIMIZERS"].split(","):
    folder = os.path.join(sys.argv[1], name)
    whole = run(name, folder, save_strategy="steps", save_steps=3)
    resumed = run(name, folder, resume=os.path.join(folder, "checkpoint-3"))
    few, many = (
        run(
            name,
            folder,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            make=language_model,
        )
        for size in (8, 1)
    )
    results[name] = {
        "weights": weights(whole), "resumed": weights(resumed), "at once": weights(few), "accumulated": weights(many),
        "bytes": whole.optimizer.optimizer.state_bytes(), "log": whole.state.log_history[0],
    }  # fmt: skip
torch.save(results, os.path.join(sys.argv[1], f"rank{dist.get_rank()}.pt"))
