"""Memory for one step."""

import torch

from hf_efcp.ops import empty, scratch


def test_memory_is_of_the_size_and_device_asked_for_with_or_without_numpy(monkeypatch):
    for library in (scratch.np, None):
        monkeypatch.setattr(scratch, "np", library)
        for size in (0, 7, 1_000_000):
            vector = empty(size, torch.device("cpu"))
            assert (vector.shape, vector.dtype, vector.device.type) == ((size,), torch.float32, "cpu")
            assert vector.fill_(2.0).sum() == 2.0 * size
        assert empty(5, torch.device("meta")).is_meta
