"""How many copies of the parameters a corrected run holds."""

import gc

import oracle_agent as oracle
import pytest
import torch


def count_copies(model, counts):
    """Take down how many float tensors of the first weight's shape are alive at each forward pass in training."""

    def count(module, args):
        alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        alive += [p.grad for p in module.parameters() if p.grad is not None]
        wanted = [x for x in alive if x.shape == module.first.weight.shape and x.is_floating_point()]
        counts.append(len({x.data_ptr() for x in wanted}))

    model.register_forward_pre_hook(count)


@pytest.mark.slow
def test_a_correction_holds_two_copies(tmp_path):
    """θ̃ and u beside θ, its momentum and its gradient, in the passes for the full gradient too."""
    counts, model = [], oracle.Net()
    count_copies(model, counts)
    oracle.make_trainer(
        tmp_path, model, oracle.examples(32), num_train_epochs=3, per_device_train_batch_size=32, sparsity=0.6,
        gradient_correction="agent", correction_args={"correct_grown": False}, logging_strategy="no",
    ).train()  # fmt: skip
    assert len(counts) == 1 + 2 * (2 + 2)
    assert max(counts) == 5
