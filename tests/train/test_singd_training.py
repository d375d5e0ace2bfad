"""SINGD under transformers' own Trainer: groups, accumulation, fp16, resume."""

import copy

import pytest
import torch
from transformers import Trainer

from hf_efcp.optim.singd import SINGD
from hf_efcp.train import EfcpTrainer

ARGS = {"optim": "efcp_singd", "optim_args": "T=2,structures=dense+hierarchical2_2", "weight_decay": 0.1}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_builds_it_over_the_model_with_its_groups(tiny_bert, arguments):
    optimizer = Trainer(tiny_bert(), arguments(**ARGS)).create_optimizer()
    assert type(optimizer) is SINGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["structures"] == "dense+hierarchical2_2"
    layer = optimizer.explain_parameters()["bert.encoder.layer.0.attention.self.query.bias"]
    assert layer.startswith("SINGD")


def test_every_parameter_is_trained(tiny_bert, texts, arguments):
    model = tiny_bert()
    before = weights(model)
    Trainer(model, arguments(**ARGS), train_dataset=texts).train()
    assert {name for name, value in weights(model).items() if torch.equal(value, before[name])} == set()


def test_resume_from_a_checkpoint_is_bit_for_bit(tiny_bert, texts, arguments, tmp_path):
    whole, halted = tiny_bert(), tiny_bert()
    saving = {**ARGS, "save_strategy": "steps", "save_steps": 4}
    Trainer(whole, arguments(**saving), train_dataset=texts).train()
    resumed = Trainer(halted, arguments(**saving), train_dataset=texts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(halted)[name]), name


def test_accumulation_is_a_larger_batch(tiny_bert, texts, arguments):
    """Without dropout, and T = 1 so that every step's statistics are sums over two micro-batches."""
    ends = []
    for size, accumulated in ((8, 1), (4, 2)):
        model = tiny_bert()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        args = arguments(**{**ARGS, "optim_args": "T=1,scaling=layer_rms"}, **changes)
        Trainer(model, args, train_dataset=texts).train()
        ends.append(weights(model))
    for name in ends[0]:  # AdamW divides rounding by rounding where an embedding's gradient vanishes
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=2e-4)


def test_scaled_loss_gives_the_unscaled_run(tiny_bert, texts, arguments):
    """The callback tells the optimizer the scaler. Trainer drops `fp16` on the CPU: nothing is clipped here."""
    ends = []
    for scaled in (False, True):
        model = tiny_bert()
        trainer = Trainer(model, arguments(**ARGS, max_grad_norm=0.0), train_dataset=texts)
        trainer.accelerator.native_amp = True  # autocast of the CPU: bfloat16, in both runs
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        trainer.train()
        if scaled:
            assert trainer.optimizer.optimizer._scaler is trainer.accelerator.scaler
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-5)


class Overflowing(torch.amp.GradScaler):
    """A scaler of the CPU that finds an overflow at given steps."""

    def __init__(self, at):
        super().__init__("cpu", init_scale=2.0**8)
        self.at, self.count = at, 0

    def unscale_(self, optimizer):
        if self.count in self.at:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
        self.count += 1
        super().unscale_(optimizer)


def test_skipped_update_is_made_up_for_under_trainer(tiny_bert, texts, arguments):
    """Overflow at the first two steps, and at the fifth: of 6 steps that count 3 update the factors at T = 2."""
    trainer = Trainer(
        tiny_bert(), arguments(**{**ARGS, "optim_args": "T=2,warm_steps=0", "max_steps": 9}), train_dataset=texts
    )
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = Overflowing(at={0, 1, 4})
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert int(optimizer._shared()["steps"]) == 6
    assert {int(optimizer.state[layer.weight]["refreshes"]) for layer in optimizer._layers()} == {3}
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_copy_of_the_model_trains_alone(tiny_bert, texts, arguments):
    model = tiny_bert()
    trainer = Trainer(model, arguments(**ARGS), train_dataset=texts)
    trainer.train()
    twin = copy.deepcopy(model)
    twin(input_ids=texts[0]["input_ids"][None], labels=torch.tensor([1])).loss.backward()
    assert not trainer.optimizer.optimizer._statistics()


class Tagger(torch.nn.Module):
    """Labels tokens; in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        self.double()

    def forward(self, x, labels=None):
        return {"logits": self.second(self.first(x).tanh())}


def token_loss(outputs, labels, num_items_in_batch):
    logits = outputs["logits"].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def sentences():
    """Eight of 6 tokens, of which 1 to 6 have a label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8, 6), generator=generator)
    lengths = torch.tensor([1, 6, 2, 5, 3, 4, 6, 1])
    return x, labels.masked_fill(torch.arange(6) >= lengths[:, None], -100)


def trained_by_hand(told):
    """Three steps over all sentences, of whose labels the optimizer is told the number or not."""
    model, (x, labels) = Tagger(), sentences()
    optimizer = SINGD(model, lr=0.1, T=1, lr_cov=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        count = labels.ne(-100).sum()
        if told:
            optimizer.set_loss_terms(count)
        token_loss(model(x), labels, count).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("size", [8, 1])
def test_trainer_tells_of_how_many_tokens_the_loss_is_the_mean(size, arguments):
    """With absolute damping the update depends on it: micro-batches of any size make the step of one batch."""
    model, (x, labels) = Tagger(), sentences()
    args = arguments(
        optim="singd", optim_args="T=1,lr_cov=0.05", learning_rate=0.1, lr_scheduler_type="constant", max_steps=3,
        per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_grad_norm=0.0,
    )  # fmt: skip
    data = [{"x": row, "labels": tags} for row, tags in zip(x, labels, strict=True)]
    EfcpTrainer(model, args, train_dataset=data, compute_loss_func=token_loss).train()
    expected, untold = trained_by_hand(told=True), trained_by_hand(told=False)
    assert not torch.allclose(expected["second.weight"], untold["second.weight"], rtol=1e-3)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-12)
