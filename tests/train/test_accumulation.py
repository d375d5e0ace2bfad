"""`accelerator.accumulate`: a step of eight micro-batches is that of one batch, with every optimizer.

In float64, where sums in another order differ by 1e-16; in float32 what rounds or divides by small roots multiplies
their last bit.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from contract import each_name, tiny_model, weights
from torch import nn


@pytest.fixture(autouse=True)
def forget():
    """accelerate's state is one for the process, and a Trainer of another test may have left some."""
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches(steps):
    """Rows with a number of tokens each, and targets."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = (torch.randn(8, 6, n, generator=generator, dtype=torch.float64) for n in (5, 3))
        yield x, y, torch.randint(1, 7, (8,), generator=generator)


def token_losses(output, y, lengths):
    """(n, 6) errors of the tokens that count."""
    present = torch.arange(6) < lengths[:, None]
    return (output - y).square().mean(-1) * present


def trained(case, n_micro, by_tokens):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n_micro)
    model = tiny_model(torch.float64)
    model, optimizer = accelerator.prepare(model, case.build(model))
    for x, y, lengths in batches(6):
        if by_tokens and hasattr(optimizer.optimizer, "set_loss_terms"):
            optimizer.optimizer.set_loss_terms(lengths.sum())
        for mine in torch.arange(8).split(8 // n_micro):
            with accelerator.accumulate(model):
                losses = token_losses(model(x[mine]), y[mine], lengths[mine])
                # accelerate divides by the number of micro-batches.
                loss = losses.sum() * n_micro / lengths.sum() if by_tokens else losses.mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert accelerator.gradient_accumulation_steps == n_micro
    return weights(accelerator.unwrap_model(model))


@each_name
@pytest.mark.parametrize("by_tokens", [False, True], ids=["means", "tokens"])
def test_eight_micro_batches_are_one_batch(case, by_tokens):
    once, often = (trained(case, n_micro, by_tokens) for n_micro in (1, 8))
    assert not torch.equal(once[0], nn.Module.get_parameter(tiny_model(torch.float64), "first.weight"))
    torch.testing.assert_close(often, once, rtol=0, atol=1e-6)
