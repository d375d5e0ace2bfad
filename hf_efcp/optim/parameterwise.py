"""What optimizers do alike that hold each parameter's state in tensors of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.base import EfcpOptimizer


class ParameterwiseOptimizer(EfcpOptimizer):
    """An `EfcpOptimizer` whose `state[p]` holds plain tensors, and `skipped` for the first parameter.

    `step` counts the gradients that a parameter has stepped with. It lies on the CPU, so that a schedule of
    `update_freq` steps needs no wait for the device: there it also counts a step that a NaN turned into nothing.
    """

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What a parameter needs, at its start."""
        raise NotImplementedError

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        """What the whole model shares; in the first parameter's state."""
        return {"skipped": torch.zeros((), dtype=torch.int64, device=device)}

    def materialize_state(self) -> None:
        """See `EfcpOptimizer.materialize_state`."""
        params = self._parameters()
        if any(p not in self.state for p in params) or not params or "skipped" not in self.state[params[0]]:
            self._adopt_state()

    def _adopt_state(self) -> None:
        """New tensors for today's parameters, filled from `self.state` where it has them."""
        for number, parameter in enumerate(self._parameters()):
            state = {"step": torch.zeros((), dtype=torch.int64, device=self._counting_device(parameter.device))}
            state.update(self._new_state(parameter))
            if number == 0:
                state.update(self._shared_state(parameter.device))
            _fill(state, self.state.get(parameter, {}))
            self.state[parameter] = state

    def _take_step(self) -> None:
        self.materialize_state()
        accept = self._acceptable()
        if not self._reads(accept) or accept:
            self._accepted_step(accept)

    def _accepted_step(self, accept: Tensor) -> None:
        """The step, of which nothing remains where the host has not seen that `accept`, () bool, is false."""
        raise NotImplementedError

    def _acceptable(self) -> Tensor:
        """() bool: the gradients are finite, and are not the zeros by which checkpointing materialises state."""
        first = self._parameters()[0]
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        finite = torch.stack([s.isfinite().to(first.device) for s in sums]).all()
        self.state[first]["skipped"] += ~finite
        if any(group["lr"] for group in self.param_groups):
            return finite
        return finite & torch.stack([g.any().to(first.device) for g in gradients]).any()


def _fill(state: dict[str, Tensor], saved: dict[str, Any]) -> None:
    for name, tensor in state.items():
        if name not in saved:
            continue
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"The saved `{name}` has shape {tuple(saved[name].shape)}; this model and these options need "
                f"{tuple(tensor.shape)}."
            )
        tensor.copy_(saved[name])
