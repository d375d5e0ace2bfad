"""A training script that knows nothing of this package, sharded by accelerate's FSDP2 on the CPU."""

import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

_init = AcceleratorState.__init__


def _sharding_on_the_cpu(self, *args, fsdp_plugin=None, **kwargs):
    """accelerate makes FSDP of several GPUs and leaves several CPUs at DDP, without a word."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _sharding_on_the_cpu


def run(name, folder, form, resume=None, options="window=4,block_size=64,density=0.1", **changes):
    set_seed(0)
    config = BertConfig(
        vocab_size=101, hidden_size=18, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
    given = {
        "output_dir": folder, "optim": name, "optim_args": options, "max_steps": 6, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "logging_steps": 2, "save_strategy": "no", "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": form, **wrap},
    }  # fmt: skip
    trainer = Trainer(
        BertForSequenceClassification(config), TrainingArguments(**{**given, **changes}), train_dataset=data
    )
    trainer.train(resume_from_checkpoint=resume)
    assert dist.get_world_size() == 2
    assert trainer.accelerator.distributed_type == DistributedType.FSDP
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    return trainer


def weights(trainer):
    return [p.detach().full_tensor() for p in trainer.model.parameters()]


results = {}
for name in ("efcp_mfac", "efcp_ggt"):
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        folder = os.path.join(sys.argv[1], name + form)
        whole = run(name, folder, form, save_strategy="steps", save_steps=3)
        resumed = run(name, folder, form, resume=os.path.join(folder, "checkpoint-3"))
        optimizer = whole.optimizer.optimizer
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        results[f"{name} {form}"] = {
            "weights": weights(whole), "resumed": weights(resumed), "bytes": optimizer.state_bytes(),
            "state": {key: type(value).__name__ for key, value in state.items()},
        }  # fmt: skip
for name in ("sketchy_shampoo", "sketchy_adagrad", "efcp_mfac_lowrank", "efcp_singd"):
    try:
        run(name, os.path.join(sys.argv[1], name), "FULL_STATE_DICT", max_steps=1, options="")
    except NotImplementedError as error:
        results[name] = str(error)
torch.save(results, os.path.join(sys.argv[1], f"rank{dist.get_rank()}.pt"))
