"""`hf-efcp memory`: what it counts is, to the byte, what an optimizer holds after a real step."""

import json
import resource
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_efcp.train  # noqa: F401  (registers the optimizers with Trainer)
from hf_efcp.cli import main
from hf_efcp.memory import footprint, memory_text, meta_model
from hf_efcp.optim import MFAC, registry
from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import OptimizerSpec, create_optimizer, get_spec, list_optimizers

IDS = torch.arange(5, 45).view(4, 10)
COMPACT = "window=8,value_dtype=int8,residual_dtype=int4,block_size=256,moment_dtype=bfloat16"
CASES = [
    *[(name, "") for name in list_optimizers()],
    *[
        (name, "preset=paper")
        for name in list_optimizers()
        if "paper" in get_spec(name).presets and name.startswith(("efcp", "sketchy"))
    ],
    ("efcp_mfac", COMPACT),
    ("efcp_mfac", "memory_budget=900KB"),
    ("efcp_mfac", "window=8,state_device=cpu"),
    ("efcp_mfac_lowrank", "window=8,system=layer,rank=2"),
    ("MFAC", '{"lr": 1e-4, "num_grads": 300, "damp": 1e-6}'),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model saved as the Hub has it: weights are there, and are not needed."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    config = BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def measured(model, name, options, device="cpu"):
    """Bytes of the storages that an optimizer holds after a step of real training."""
    model = model.to(device).train()
    optimizer = create_optimizer(name, model, lr=1e-3, **{o: value for o, value in options.items() if o != "lr"})
    model(input_ids=IDS.to(device), labels=torch.arange(4, device=device) % 2).loss.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "args"), CASES)
def test_bytes_counted_are_those_of_a_real_step(name, args, device, folder):
    options = parse_optim_args(args)
    counted = footprint(meta_model(str(folder))[0], name, options, device=device)
    model = BertForSequenceClassification.from_pretrained(folder)
    assert counted.state == measured(model, name, options, device) > 0
    assert counted.weights - sum(b.nbytes for b in model.buffers()) == sum(p.nbytes for p in model.parameters())
    assert counted.gradients == sum(p.grad.nbytes for p in model.parameters())


def test_bytes_of_a_frozen_bfloat16_model(folder):
    model, _ = meta_model(str(folder), dtype="bfloat16")
    real = BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    for some in (model, real):
        some.bert.embeddings.requires_grad_(False)
    counted = footprint(model, "efcp_ggt", {"window": 4})
    assert counted.state == measured(real, "efcp_ggt", {"window": 4})
    assert counted.gradients == 2 * counted.n_trained == counted.adamw / 2
    assert counted.n_trained < counted.n_parameters == sum(p.numel() for p in real.parameters())


def test_bytes_are_those_that_trainer_logs(folder, tmp_path):
    """Trainer's two parameter groups change nothing."""
    args = TrainingArguments(
        str(tmp_path), optim="efcp_mfac", optim_args="window=4", max_steps=2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": 0} for row in IDS]
    trainer = Trainer(BertForSequenceClassification.from_pretrained(folder), args, train_dataset=data)
    trainer.train()
    counted = footprint(meta_model(str(folder))[0], "efcp_mfac", {"window": "4"})
    assert trainer.state.log_history[0]["optim_state_bytes"] == counted.state


def test_on_a_gpu_the_inverse_is_not_kept(folder):
    """Above 256 rows an inverse follows the Gram matrix, in float64, on the CPU alone."""
    model, _ = meta_model(str(folder))

    def state(device, **options):
        options = {"window": 300, "damping_mode": "absolute", "damping_warmup": 0, **options}
        return footprint(model, "efcp_mfac", options, device=device).state

    assert state("cpu") - state("cuda") == 8 * 300**2
    assert state("cuda", state_device="cpu") == state("cpu")


def test_seven_billion_parameters_are_counted_without_allocating():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = memory_text("llama", "efcp_mfac", {"state_device": "cpu"}, dtype="bfloat16", world_size=8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert "6,607,343,616 parameters, bfloat16 (default config of the model type llama)" in text
    assert "the first of 8 processes of DDP" in text
    assert "state_device=cpu" in text


def test_the_command_prints_the_count_beside_adamw(folder, capsys):
    verbosity = transformers.logging.get_verbosity()
    assert main(["memory", str(folder), "--optim", "mfac", "--optim_args", "window=4"]) == 0
    assert transformers.logging.get_verbosity() == verbosity
    text = capsys.readouterr().out
    count = footprint(meta_model(str(folder))[0], "mfac", {"window": 4})
    printed = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if len(words) == 3}
    for label, size in {
        "weights": count.weights, "gradients": count.gradients, "mfac": count.state,
        "adamw_torch": 8 * count.n_trained,
    }.items():  # fmt: skip
        assert printed[label] == [f"{size / count.n_trained:.2f}", f"{size:,}"]
    assert text.startswith(f"BertForSequenceClassification, {count.n_parameters:,} parameters, float32 ")
    assert "mfac: window=4." in text


def test_several_numbers_of_processes_are_one_table(folder, capsys):
    words = ["memory", "--optim", "mfac", "--optim_args", "window=4", "--world_size", "1", "2", "--model", str(folder)]
    assert main(words) == 0
    rows = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("mfac of"))
    model, _ = meta_model(str(folder))
    for row, size in zip(rows.values(), (1, 2), strict=True):
        assert row.strip() == f"{footprint(model, 'mfac', {'window': 4}, world_size=size).state:,}"


def test_what_a_budget_picked_is_printed(folder):
    text = " ".join(memory_text(str(folder), "efcp_mfac", {"memory_budget": "800KB"}).split())
    count = footprint(meta_model(str(folder))[0], "efcp_mfac", {"memory_budget": "800KB"})
    assert count.state <= 800_000
    for option in ("window", "density", "value_dtype", "residual_dtype", "moment_dtype", "block_size"):
        assert f"{option}={count.settings[option]}" in text
    assert "memory_budget=800KB" in text


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_config_is_enough_and_another_class_may_be_asked_for(source, tmp_path):
    AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=24, num_attention_heads=2).save_pretrained(tmp_path)
    path = str(tmp_path if source == "folder" else tmp_path / "config.json")
    model, origin = meta_model(path)
    assert (type(model).__name__, origin) == ("BertModel", f"config of {path}")
    assert type(meta_model(path, model_class="BertForMaskedLM")[0]) is transformers.BertForMaskedLM
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, ["--model_class", "Bert4"], "has no class `Bert4`, asked for by `--model_class`"),
        ({}, ["--model_class", "Trainer"], "Trainer cannot be built from the config"),
        ({"architectures": ["MyModel"]}, [], "has no class `MyModel`, named by the config; give one with"),
        ({"model_type": "mine"}, [], "cannot be read"),
        ({}, ["--world_size", "0"], "`world_size` must be at least 1, got 0."),
        ({}, ["--world_size", "8", "-2"], "`world_size` must be at least 1, got -2."),
        ({}, ["--optim_args", "windo=3"], "Did you mean `window`?"),
        ({}, ["--optim_args", "memory_budget=1KB"], "the smallest window, of 8 rows, takes"),
    ],
)
def test_what_cannot_be_counted_is_told_in_one_line(changes, words, message, folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    assert main(["memory", str(tmp_path), "--optim", "efcp_mfac", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "./nothing"])
def test_a_hub_id_that_cannot_be_reached_is_one_line(source, capsys):
    assert main(["memory", source, "--optim", "mfac"]) == 2
    assert capsys.readouterr().err.startswith(f"hf-efcp: `{source}` is no local folder and no model type, and the Hub")


def test_no_model_is_told(capsys):
    assert main(["memory", "--optim", "mfac"]) == 2
    assert "There is no model to count: give a Hub id" in capsys.readouterr().err


def test_a_folder_without_config_is_told(tmp_path, capsys):
    assert main(["memory", str(tmp_path), "--optim", "mfac"]) == 2
    assert "is a folder without config.json" in capsys.readouterr().err


def test_an_optimizer_that_knows_its_state_at_the_first_step_only_says_so(folder, monkeypatch):
    class Late(MFAC):
        def materialize_state(self):
            raise NotImplementedError

    monkeypatch.setitem(registry._SPECS, "late", OptimizerSpec("late", Late, "", ""))
    with pytest.raises(ValueError, match="`late` makes its state at its first step"):
        footprint(meta_model(str(folder))[0], "late", {})


def test_without_transformers_the_pip_line_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["memory", "bert", "--optim", "mfac"]) == 2
    assert "pip install 'hf-efcp[hf]'" in capsys.readouterr().err


def test_a_model_with_nothing_to_train_is_refused(folder):
    model, _ = meta_model(str(folder))
    with pytest.raises(ValueError, match="has no parameter that is trained"):
        footprint(model.requires_grad_(False), "mfac", {})
