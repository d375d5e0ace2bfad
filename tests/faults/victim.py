"""A nursery of trainers: a process that has imported everything forks one run after the other, and kills it."""

import os
import random
import signal
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments, set_seed

from hf_efcp.train import EfcpTrainer
from hf_efcp.train.checkpoints import last_complete_checkpoint

STEPS = 24
OPTIONS = {"window": 4, "block_size": 64, "density": 0.1, "rank": 2, "update_freq": 2}


class Report(TrainerCallback):
    """Tells the parent each step that begins."""

    def __init__(self, pipe):
        self._pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        os.write(self._pipe, b"%d\n" % state.global_step)


def train(folder, name, options, *, pipe=None, dies_in_save=None):
    """A run to its end, with dropout, from the last complete checkpoint in `folder`; its weights."""
    torch.set_num_threads(1)
    set_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]
    args = TrainingArguments(
        output_dir=folder, optim=name, optim_args=",".join(f"{k}={v}" for k, v in options.items()), max_steps=STEPS,
        per_device_train_batch_size=4, learning_rate=1e-3, save_steps=2, save_total_limit=3, logging_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = EfcpTrainer(
        BertForSequenceClassification(config), args, train_dataset=data, callbacks=[Report(pipe)] if pipe else None
    )
    if dies_in_save:
        _die_in_save(dies_in_save)
    trainer.train(resume_from_checkpoint=True if last_complete_checkpoint(folder) else None)
    return [p.detach() for p in trainer.model.parameters()]


def _die_in_save(file_name):
    """The process kills itself when half of a file of this name is written."""
    save = torch.save

    def killed(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if os.path.basename(str(path)) == file_name:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed


def forked(kill_at=None, **arguments):
    """A run in a child of its own, killed when it begins step `kill_at`. Returns whether it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            weights = train(**arguments, pipe=writing)
            torch.save(weights, os.path.join(arguments["folder"], "weights.pt"))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as steps:
        for line in steps:
            if kill_at is not None and int(line) >= kill_at:
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def kill_often(folder, name, options, n_kills):
    """`n_kills` runs killed at random steps, one of them in the middle of a save, and one that ends. Counts kills."""
    chance = random.Random(0)
    killed, reached = 0, 0
    for number in range(n_kills):
        # On average a new step is reached every time, so that the last kill is near the run's end.
        kill_at = min(STEPS - 1, reached + chance.randint(0, 2))
        saves = {"dies_in_save": chance.choice(["optimizer.pt", "scheduler.pt"])} if number % 5 == 2 else {}
        killed += forked(kill_at=None if saves else kill_at, folder=folder, name=name, options=options, **saves)
        reached = max([int(entry.split("-")[1]) for entry in os.listdir(folder) if "-" in entry], default=0)
    assert not forked(folder=folder, name=name, options=options)
    return killed
