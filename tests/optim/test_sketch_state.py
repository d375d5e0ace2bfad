"""When the sketches of S-Shampoo are updated."""

import itertools

import pytest

from hf_efcp.optim.sketch_state import due_update


@pytest.mark.parametrize(("warm", "every"), [(0, 1), (0, 4), (3, 4), (4, 4), (9, 4), (5, 1)])
def test_updates_are_due_at_warm_steps_and_multiples(warm, every):
    counts = [count for count in range(40) if count < warm or count % every == 0]
    due = [due_update(count, {"warm_steps": warm, "update_freq": every}) for count in range(40)]
    assert [count for count in range(40) if due[count]] == counts
    assert [due[count].number for count in counts] == list(range(len(counts)))
    assert [due[count].steps for count in counts[1:]] == [b - a for a, b in itertools.pairwise(counts)]
