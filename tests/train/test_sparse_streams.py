"""AGENT over data without a length."""

import oracle_agent as oracle
import pytest
import torch


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(oracle.examples(64))


def test_streams_are_read_again_for_some_batches(tmp_path):
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), Stream(), gradient_correction="agent", max_steps=8,
        correction_args="coefficient=fixed,value=0.5,refresh=3,full_grad_batches=2",
    )  # fmt: skip
    trainer.train()
    assert trainer._sparse.correction.core.last_refresh == 6
    assert trainer.state.log_history[-2]["agent_coefficient"] == 0.5


def test_streams_that_end_are_read_from_their_start(tmp_path, monkeypatch):
    """8 batches a pass. Each refresh sees the batches that come next in the running pass, and those of a new one."""
    from hf_efcp.sparsity import GradientCorrection

    seen, calls, measure = [], [], GradientCorrection.measure_

    def recording(core, gradients, at_snapshot, scale, masks):
        seen.append(core.last_refresh)
        calls.append({n: core.full_gradient[n] - g for n, g in at_snapshot.items()})
        measure(core, gradients, at_snapshot, scale, masks)

    monkeypatch.setattr(GradientCorrection, "measure_", recording)
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), Stream(), gradient_correction="agent", max_steps=24,
        correction_args="coefficient=grad,measure_every=1,refresh=4,full_grad_batches=4",
    )  # fmt: skip
    trainer.train()
    assert seen == [step // 4 * 4 for step in range(4, 24)]
    for start in range(0, 20, 4):
        for name in calls[0]:
            assert sum(call[name] for call in calls[start : start + 4]).abs().max() < 1e-12


@pytest.mark.parametrize("given", ["refresh=3", "full_grad_batches=3"])
def test_streams_have_no_epoch(given, tmp_path):
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), Stream(), gradient_correction="agent", max_steps=8, correction_args=given
    )
    with pytest.raises(ValueError, match=r"has no length.*refresh=1000,full_grad_batches=50"):
        trainer.train()
