"""Every registered optimizer is an `--optim` of transformers' own Trainer, and nothing else changes."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

import hf_efcp.train
from hf_efcp import list_optimizers
from hf_efcp.optim import MFAC
from hf_efcp.optim.options import Option
from hf_efcp.optim.registry import OptimizerSpec
from hf_efcp.train.registration import _handler, register_optimizers, resolve_for_trainer

PUBLISHED = '{"lr": 1e-4, "num_grads": 512, "damp": 1e-6}'


def python(code, *words, **environment):
    """Run code in a fresh interpreter; its output, or a failure that shows it."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_is_a_choice_of_the_command_line(name, tmp_path):
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name, "--use_cpu"]
    )
    assert args.optim == name
    assert args.optim is OptimizerNames(name)


def test_trainer_builds_the_optimizer_with_its_own_groups(tiny_bert, arguments):
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    args = arguments(optim="efcp_mfac", optim_args="window=7, damping=0.5,value_dtype=bfloat16", weight_decay=0.1)
    optimizer = Trainer(model, args).create_optimizer()
    assert type(optimizer) is MFAC
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}
    settings = [optimizer.defaults[name] for name in ("window", "damping", "value_dtype", "compression")]
    assert settings == [7, 0.5, "bfloat16", "topk"]


def test_frozen_parameters_stay(tiny_bert, texts, arguments):
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    Trainer(model, arguments(optim="efcp_mfac", weight_decay=0.1), train_dataset=texts).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_published_flags_of_mfac_work(tiny_bert, arguments):
    args = arguments(optim="MFAC", optim_args=PUBLISHED, learning_rate=5e-5)
    optimizer = Trainer(tiny_bert(), args).create_optimizer()
    assert {g["lr"] for g in optimizer.param_groups} == {1e-4}
    assert [optimizer.defaults[name] for name in ("window", "damping", "compression")] == [512, 1e-6, "none"]


def test_two_learning_rates_are_refused(tiny_bert, arguments):
    args = arguments(optim="MFAC", optim_args=PUBLISHED, learning_rate=2e-5)
    with pytest.raises(ValueError, match=r"--learning_rate 2e-05.*`lr` = 0.0001"):
        Trainer(tiny_bert(), args).create_optimizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim_args": "widow=4"}, "no option `widow`. Did you mean `window`"),
        ({"optim_args": "density=3"}, "`density` must be in"),
        ({"optim_args": "lr=0.1"}, "--learning_rate"),
        ({"optim_args": "weight_decay=0.1"}, "--weight_decay"),
        ({"optim": "MFAC", "optim_args": '{"weight_decay": 0.1}'}, "--weight_decay"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message, tiny_bert, arguments):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_bert(), arguments(**{"optim": "efcp_mfac", **changes})).create_optimizer()


def test_optimizers_over_a_module_get_it_and_the_groups(tiny_bert, arguments, monkeypatch):
    class OverModule(torch.optim.SGD):
        options = (Option("momentum", float, ""),)

        def __init__(self, model, lr, *, params, momentum=0.0):
            self.model = model
            super().__init__(params, lr, momentum)

    spec = OptimizerSpec(name="over_module", cls=OverModule, summary="", paper="", needs_model=True)
    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, "efcp_mfac", _handler(spec))
    model = tiny_bert()
    made = Trainer(model, arguments(optim="efcp_mfac", optim_args="momentum=0.3", weight_decay=0.1)).create_optimizer()
    usual = Trainer(model, arguments(optim="mfac", weight_decay=0.1)).create_optimizer()
    assert made.model is model
    assert made.defaults["momentum"] == 0.3
    for group, expected in zip(made.param_groups, usual.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]


def test_registering_again_changes_nothing():
    before = list(OptimizerNames), list(trainer.DEFAULT_CALLBACKS), set(trainer_optimizer._OPTIMIZER_HANDLERS)
    register_optimizers()
    assert (list(OptimizerNames), list(trainer.DEFAULT_CALLBACKS), set(trainer_optimizer._OPTIMIZER_HANDLERS)) == before


def test_optimizers_of_transformers_stay(tiny_bert, arguments):
    args = arguments(optim="adamw_torch", optim_args="fused=False")
    assert type(Trainer(tiny_bert(), args).create_optimizer()) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["_OPTIMIZER_HANDLERS", "_parse_optim_args"])
def test_another_transformers_is_named(name, monkeypatch):
    monkeypatch.delattr(trainer_optimizer, name)
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*{name}"):
        register_optimizers()


def test_resolving_for_trainer_leaves_its_argument_alone():
    raw = {"window": "4"}
    assert resolve_for_trainer(hf_efcp.optim.get_spec("mfac"), 1e-3, raw)["lr"] == 1e-3
    assert raw == {"window": "4"}


def test_training_args_load_without_this_package(arguments, tmp_path):
    """`training_args.bin` is pushed with the model; plain and own arguments alike must load anywhere."""
    torch.save(arguments(optim="efcp_mfac"), tmp_path / "plain.bin")
    torch.save(arguments(hf_efcp.train.EfcpTrainingArguments, optim_args={"window": 4}), tmp_path / "own.bin")
    code = BLOCK.replace("blocked", "['hf_efcp']") + (
        "import torch\n"
        "for path in sys.argv[1:]:\n"
        "    args = torch.load(path, weights_only=False)\n"
        "    print(type(args).__name__, type(args.optim).__name__, args.optim, args.optim_args)\n"
    )
    shim = os.path.join(os.path.dirname(__file__), os.pardir, "cpu_torchvision")
    out = python(code, tmp_path / "plain.bin", tmp_path / "own.bin", PYTHONPATH=shim)
    assert out.splitlines() == [
        "TrainingArguments str efcp_mfac None",
        'TrainingArguments str efcp_mfac {"window": 4}',
    ]


def test_pickled_members_are_plain_strings():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(OptimizerNames("efcp_mfac"), protocol))) is str


def test_optimizers_alone_need_and_patch_nothing():
    """`hf_efcp` and `hf_efcp.optim` work where the Hugging Face libraries cannot be imported."""
    code = BLOCK.replace("blocked", "['transformers', 'accelerate', 'datasets', 'huggingface_hub']") + (
        "import torch, hf_efcp, hf_efcp.optim\n"
        "adamw = torch.optim.AdamW\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "optimizer = hf_efcp.create_optimizer('efcp_mfac', [p], lr=0.1, window=2)\n"
        "p.grad = torch.ones(3); optimizer.step(); print(bool((p < 1).all()), torch.optim.AdamW is adamw)\n"
        "try: import hf_efcp.train\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    first, second = python(code).splitlines()
    assert first == "True True"
    assert "pip install 'hf-efcp[hf]'" in second


def test_only_the_train_package_touches_transformers():
    code = (
        "import hf_efcp, hf_efcp.optim, hf_efcp.cli, hf_efcp.run, sys\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'accelerate')])\n"
    )
    assert python(code).strip() == "[]"
