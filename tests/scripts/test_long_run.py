"""20,000 steps with every optimizer: memory flat, solver and sketch within their bounds, the loss falling."""

import long_run
import pytest

from hf_efcp.optim.registry import list_optimizers


def check(name, steps, growth):
    found = long_run.run(name, steps)
    first, middle, last = found.losses
    assert found.growth < growth
    assert found.state_bytes == found.state_bytes_early
    assert last < 0.5 * first
    assert last < 1.1 * middle
    for what, drift in found.drift.items():
        assert drift < long_run.BOUNDS[what], what


@pytest.mark.slow
@pytest.mark.parametrize("name", list_optimizers())
def test_twenty_thousand_steps_leave_nothing_behind(name):
    check(name, 20_000, growth=1_000_000)


@pytest.mark.parametrize("name", ["MFAC", "sketchy_shampoo", "efcp_singd"])
def test_hundreds_of_steps_keep_the_bounds(name):
    """The process itself still grows then, by what torch sets up at first use."""
    check(name, 300, growth=20_000_000)
