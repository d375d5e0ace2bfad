"""`hf-efcp explain NAME --model MODEL`: each parameter's treatment, as the optimizer over the real model tells it."""

import re

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efcp.cli import main
from hf_efcp.optim.registry import create_optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model's folder: embeddings tied to the head, transposed weights, norms."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return folder


def explained(capsys, *words):
    code = main(["explain", *map(str, words)])
    return code, capsys.readouterr()


def test_each_parameter_is_told_as_the_optimizer_treats_it(folder, capsys):
    model = GPT2LMHeadModel.from_pretrained(folder)
    args = "structures=dense+hierarchical2_2"
    code, printed = explained(capsys, "efcp_singd", "--model", folder, "--optim_args", args)
    assert code == 0
    told = create_optimizer("efcp_singd", model, lr=1e-3, structures="dense+hierarchical2_2").explain_parameters()
    lines = printed.out.splitlines()
    assert lines[0].startswith(f"GPT2LMHeadModel, {sum(p.numel() for p in model.parameters()):,} parameters (config of")
    rows = {line.split()[0]: line for line in lines[5:]}
    assert rows.keys() == told.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        shape, treatment = rows[name].split(maxsplit=2)[1:]
        assert (shape, treatment) == ("×".join(map(str, p.shape)), told[name])
    assert "inputs dense (17), outputs hierarchical2_2 (48)" in rows["transformer.h.0.attn.c_attn.weight"]


def test_the_sums_count_every_number_once(folder, capsys):
    model = GPT2LMHeadModel.from_pretrained(folder)
    _, printed = explained(capsys, "singd", "--model", folder)
    counts = {}
    for line in printed.out.splitlines()[2:4]:
        kind, numbers, parameters = re.fullmatch(r"(\w+): ([\d,]+) numbers in (\d+) parameters", line).groups()
        counts[kind] = int(numbers.replace(",", "")), int(parameters)
    assert counts.keys() == {"AdamW", "SINGD"}
    totals = tuple(map(sum, zip(*counts.values(), strict=True)))
    assert totals == (sum(p.numel() for p in model.parameters()), len(list(model.parameters())))


def test_optimizers_that_treat_all_alike_say_so(folder, capsys):
    code, printed = explained(capsys, "efcp_mfac", "--model", folder)
    assert code == 2
    assert "`efcp_mfac` treats all parameters alike; `--model` tells them apart for efcp_singd, singd." in printed.err


def test_a_wrong_option_is_named_before_a_model_is_looked_for(capsys):
    code, printed = explained(capsys, "efcp_singd", "--model", "no/such/model", "--optim_args", "structure=dense")
    assert code == 2
    assert "Did you mean `structures`?" in printed.err
