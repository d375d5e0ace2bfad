"""What optimizers do alike that hold each parameter's state in tensors of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.parallel import Group, Replicated, Sharing, check_replicas, collect, find_sharing


class Owners:
    """Which rank keeps and steps which parameter: one whole parameter has one owner.

    Args:
        params: all parameters.
        sharing: how they lie on the ranks.
        costs: of each parameter, by which the ranks' shares are made equal.
    """

    def __init__(self, params: Sequence[Tensor] = (), sharing: Sharing | None = None, costs: Sequence[int] = ()):
        self.group = sharing.group if sharing else Group()
        self._params = list(params)
        self._parts: list[Replicated] = []
        if self.group.size > 1:
            kinds: dict[Any, list[int]] = {}
            for number, p in enumerate(params):
                kinds.setdefault((str(p.device), str(p.dtype)), []).append(number)
            self._parts = [
                Replicated([params[n] for n in numbers], None, self.group, [costs[n] for n in numbers])
                for numbers in kinds.values()
            ]
        self._mine = set(self.of(self.group.rank) if self._parts else params)

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are owners of `params`, none swapped since."""
        return len(params) == len(self._params) > 0 and all(p is q for p, q in zip(params, self._params, strict=True))

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._mine

    def of(self, rank: int) -> list[Tensor]:
        """The parameters of a rank."""
        return [part.params[piece.number] for part in self._parts for piece in part.by_rank[rank]]

    def share(self) -> None:
        """Let all ranks have the weights of each owner."""
        for part in self._parts:
            part.share([part.params[piece.number].detach() for piece in part.pieces])


class ParameterwiseOptimizer(EfcpOptimizer):
    """An `EfcpOptimizer` whose `state[p]` holds plain tensors, and `skipped` for the first parameter.

    Where several ranks divide it (`shard_state`), each parameter has an owner, which alone has its state and steps it.
    `step` counts the gradients that a parameter has stepped with. It lies on the CPU, so that a schedule of
    `update_freq` steps needs no wait for the device: there it also counts a step that a NaN turned into nothing.
    """

    _owners = Owners()

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What a parameter needs, at its start."""
        raise NotImplementedError

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        """What the whole model shares; in the first parameter's state."""
        return {"skipped": torch.zeros((), dtype=torch.int64, device=device)}

    def materialize_state(self) -> None:
        """See `EfcpOptimizer.materialize_state`."""
        params = self._parameters()
        if not self._owners.fits(params) or any(p not in self.state for p in params):
            self._adopt_state()
            if self._is_divided and not params[0].is_meta:
                check_replicas(params, self._owners.group)

    def _adopt_state(self) -> None:
        """New tensors for what this rank owns of today's parameters, filled from `self.state` where it has them."""
        params = self._parameters()
        saved = self._join_state(keeps=True) if self._is_divided else dict(self.state)
        sharing = find_sharing(params, self.defaults.get("shard_state"))
        if sharing.kind == "replicated" and "shard_state" not in self.defaults:
            sharing = Sharing()
        if sharing.kind == "sharded":
            raise NotImplementedError(
                f"{type(self).__name__} needs whole parameters, and these are sharded. With FSDP2 use efcp_mfac or "
                "efcp_ggt; with DDP every optimizer works."
            )
        owners = Owners(params, sharing, [self._cost(p) for p in params] if sharing.group.size > 1 else [])
        for number, parameter in enumerate(params):
            state: dict[str, Tensor] = {}
            if parameter in owners:
                state["step"] = torch.zeros((), dtype=torch.int64, device=self._counting_device(parameter.device))
                state.update(self._new_state(parameter))
            if number == 0:
                state.update(self._shared_state(parameter.device))
            _fill(state, saved.get(parameter, {}))
            self.state[parameter] = state
        self._owners = owners

    def _cost(self, parameter: Tensor) -> int:
        """Bytes of a parameter's state."""
        return sum(t.nbytes for t in self._new_state(parameter.detach().to("meta")).values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `EfcpOptimizer.load_state_dict`."""
        owners, self._owners = self._owners, Owners()
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self._owners = owners
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owners = Owners()

    @property
    def _is_divided(self) -> bool:
        return self._owners.group.size > 1

    def _join_state(self, keeps: bool) -> dict[Tensor, dict[str, Tensor]] | None:
        params, group = self._parameters(), self._owners.group
        whole: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params}
        shared = self._shared_state(torch.device("meta")).keys()
        mine = [self.state[p] for p in self._owners.of(group.rank)]
        for rank, states in enumerate(collect(group, mine, params[0].device)):
            if keeps:
                whole.update(zip(self._owners.of(rank), states, strict=True))
        first = self.state[params[0]]
        whole[params[0]].update({name: first[name].to("cpu", copy=True) for name in shared})
        return whole if keeps else None

    def _take_step(self) -> None:
        self.materialize_state()
        accept = self._acceptable()
        if not self._reads(accept) or accept:
            self._accepted_step(accept)
            self._owners.share()

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
