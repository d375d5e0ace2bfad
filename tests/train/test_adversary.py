"""Adversarial examples of images in closed form, and one attack a batch for every term of a corrected step."""

import oracle_agent as oracle
import pytest
import torch
from torch import nn

from hf_efcp.train import FGSM, PGD, EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.adversary import make_adversary

AGENT = {"gradient_correction": "agent", "correction_args": {"gamma": 0.5}}


class Linear(nn.Module):
    """A loss that is linear in the images, with a norm whose statistics and a dropout whose mode can be watched."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, pixel_values, labels=None):
        self.dropout(self.norm(pixel_values))
        scores = (pixel_values * self.weight).sum((1, 2, 3))
        return {"loss": (scores * labels).mean()}


def batch(n=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(n, 3, 4, 4, generator=generator),
        "labels": torch.tensor([1.0, -1, 1, -1, 1])[:n],
    }


def test_fgsm_is_one_step_along_the_sign():
    """x + ε·sign(y·w) for a loss y·⟨w, x⟩, in closed form."""
    model, clean = Linear(), batch()
    attacked = FGSM(epsilon=0.1)(model, clean)
    step = 0.1 * (clean["labels"][:, None, None, None] * model.weight.detach()).sign()
    torch.testing.assert_close(attacked["pixel_values"], clean["pixel_values"] + step)
    assert attacked["labels"] is clean["labels"]


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_ends_in_the_corner_of_the_ball(random_start):
    """For a linear loss, from wherever it starts; clipped to the range of pixels."""
    model, clean = Linear(), batch()
    attack = PGD(epsilon=0.1, steps=10, random_start=random_start, low=0.0, high=1.0)
    step = 0.1 * (clean["labels"][:, None, None, None] * model.weight.detach()).sign()
    expected = (clean["pixel_values"] + step).clamp(0, 1)
    torch.testing.assert_close(attack(model, clean)["pixel_values"], expected)


def test_an_attack_leaves_the_model_alone():
    model = Linear().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PGD(steps=2)(model, batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)


def test_inputs_without_images_are_refused():
    with pytest.raises(ValueError, match="No inputs `pixel_values` to attack; `key` takes one of x, labels"):
        make_adversary("fgsm")(oracle.Net(), {"x": torch.zeros(1, 6), "labels": torch.zeros(1)})
    assert make_adversary("pgd:epsilon=0.3,steps=7,key=x") == PGD(epsilon=0.3, steps=7, key="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd:epsilon=much", "`epsilon` must be at least 0, got 'much'"),
        ("pgd:step_size=-1", "`step_size` must be at least 0"),
        ("pgd:steps=true", "`steps` must be at least 1, got True"),
        ("pgd:low=1,high=0", "`low` and `high` must be numbers, low ≤ high, got 1 and 0"),
        ("pgd:random_start=2", "`random_start` must be true or false"),
        ("pgd:key=3", "`key` must be a name"),
        ("fgsm:steps=3", "FGSM takes one step; PGD takes 3"),
    ],
)
def test_wrong_options_are_refused(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_adversary(text)


def test_an_adversary_must_return_inputs(tmp_path):
    base = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples())
    trainer = EfcpTrainer(base.model, base.args, train_dataset=oracle.examples(), adversary=lambda model, inputs: None)
    with pytest.raises(TypeError, match="`adversary` must return the inputs to train on, a dict, got NoneType"):
        trainer.train()


def test_a_batch_is_attacked_once_and_used_for_every_term(tmp_path, monkeypatch):
    """Once a batch, at today's weights; both passes and the full gradient see the same adversarial examples."""
    seen, attacks = [], []
    forward = oracle.Net.forward

    def watched(self, x, labels=None):
        if self.training:
            seen.append((float(x.sum()), torch.is_grad_enabled(), float(self.first.weight.sum().detach())))
        return forward(self, x, labels)

    def adversary(model, inputs):
        attacked = FGSM(epsilon=0.2, key="x")(model, inputs)
        sum(p.sum() for p in model.parameters()).backward()  # gradients left behind must not count
        attacks.append((float(attacked["x"].sum()), float(model.first.weight.sum().detach())))
        return attacked

    monkeypatch.setattr(oracle.Net, "forward", watched)
    args = {"per_device_train_batch_size": 18, "num_train_epochs": 2, **AGENT}
    base = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), **args)
    trainer = EfcpTrainer(
        base.model, base.args, train_dataset=oracle.examples(), adversary=adversary,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )  # fmt: skip
    trainer.train()
    # 2 steps; a pass over 2 batches, each at both weights; 2 steps of two passes
    assert len(attacks) == 2 + 2 + 2
    assert len(seen) == 2 + 4 + 4
    now = [seen[0], seen[1], seen[2], seen[4], seen[6], seen[8]]
    old = [seen[3], seen[5], seen[7], seen[9]]
    assert [(x, w) for x, _, w in now] == attacks
    assert [x for x, *_ in old] == [x for x, *_ in now[2:]]
    assert [grad for _, grad, _ in old] == [False, False, True, True]
    start = attacks[0][1]
    assert [w for *_, w in old[:2]] == [start, start]
    assert [w for *_, w in old[2:]] == [attacks[2][1]] * 2  # the weights at which the epoch began


def test_adversarial_training_of_a_vit(tiny_vit, images, arguments):
    args = arguments(
        EfcpTrainingArguments, optim="adamw_torch", sparsity=0.8, adversary="pgd:steps=2", num_train_epochs=1,
        max_steps=-1, **AGENT,
    )  # fmt: skip
    trainer = EfcpTrainer(tiny_vit(), args, train_dataset=images)
    trainer.train()
    assert isinstance(trainer._sparse._adversary, PGD)
    assert trainer.state.log_history[0]["loss"] > 1
