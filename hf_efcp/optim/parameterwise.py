"""What optimizers do alike that hold each parameter's state in tensors of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.base import EfcpOptimizer, fill_
from hf_efcp.optim.rounding import step_rounded_
from hf_efcp.parallel import Group, Replicated, Sharing, balanced, check_replicas, collect, find_sharing


class Owners:
    """Which rank keeps and steps which parameter: one whole parameter has one owner.

    Args:
        params: all parameters.
        sharing: how they lie on the ranks.
        units: parameters that stay together.
        costs: of each unit, by which the ranks' shares are made equal.
    """

    def __init__(
        self,
        params: Sequence[Tensor] = (),
        sharing: Sharing | None = None,
        units: Sequence[Sequence[Tensor]] = (),
        costs: Sequence[int] = (),
    ):
        self.group = sharing.group if sharing else Group()
        self._params = list(params)
        ranks = balanced(costs, self.group.size) if self.group.size > 1 else [self.group.rank] * len(units)
        self._rank_of = {p: rank for unit, rank in zip(units, ranks, strict=True) for p in unit}
        self._parts = self._divided(params, params)

    def _divided(self, tensors: Sequence[Tensor], owned_with: Sequence[Tensor]) -> list[Replicated]:
        """The tensors in lots of one device and dtype, each with the owner of the parameter it is `owned_with`."""
        lots: dict[Any, tuple[list[Tensor], list[int]]] = {}
        for tensor, parameter in zip(tensors, owned_with, strict=True):
            lot = lots.setdefault((str(tensor.device), str(tensor.dtype)), ([], []))
            lot[0].append(tensor)
            lot[1].append(self._rank_of[parameter])
        return [Replicated(lot, None, self.group, ranks) for lot, ranks in lots.values()] if self.group.size > 1 else []

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are owners of `params`, none swapped since."""
        return len(params) == len(self._params) > 0 and all(p is q for p, q in zip(params, self._params, strict=True))

    def __contains__(self, parameter: Tensor) -> bool:
        return self._rank_of.get(parameter) == self.group.rank

    def of(self, rank: int) -> list[Tensor]:
        """The parameters of a rank."""
        return [p for p in self._params if self._rank_of[p] == rank]

    def share(self) -> None:
        """Let all ranks have the weights of each owner."""
        _share(self._parts)

    def share_tensors(self, tensors: Sequence[Tensor], owned_with: Sequence[Tensor]) -> None:
        """Let all ranks have, in place, what the owners of the parameters in `owned_with` have in `tensors`."""
        _share(self._divided(tensors, owned_with))


def _share(parts: Sequence[Replicated]) -> None:
    for part in parts:
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

    def _known_to_all(self, parameter: Tensor) -> Collection[str]:
        """Names of what all ranks keep of a parameter, and not its owner alone."""
        return ()

    def _units(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        """All parameters in lots that have one owner."""
        return [[p] for p in params]

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
        units = self._units(params)
        costs = [sum(map(self._cost, unit)) for unit in units] if sharing.group.size > 1 else []
        owners = Owners(params, sharing, units, costs)
        for number, parameter in enumerate(params):
            self.state[parameter] = old = saved.get(parameter, {})
            state = self._made_state(parameter, parameter in owners)
            if number == 0:
                state.update(self._shared_state(parameter.device))
            fill_(state, old)
            self.state[parameter] = state
        self._owners = owners

    def _made_state(self, parameter: Tensor, is_owned: bool) -> dict[str, Tensor]:
        if is_owned:
            step = torch.zeros((), dtype=torch.int64, device=self._counting_device(parameter.device))
            return {"step": step, **self._new_state(parameter)}
        names = self._known_to_all(parameter)
        return {name: tensor for name, tensor in self._new_state(parameter).items() if name in names} if names else {}

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

    def _move(self, p: Tensor, update: Tensor, group: dict[str, Any], lr: float, accept: Tensor) -> None:
        """`p ← p(1 − lr·weight_decay) − lr·update`; 16-bit weights are rounded as `weight_rounding` says.

        Args:
            update: of the shape of `p`, zero where the step is not accepted.
            accept: () bool, of the decay.
        """
        decay = group["weight_decay"]
        factor = 1 - lr * decay * accept.to(p.device).double() if lr and decay else None
        if lr and p.dtype in (torch.bfloat16, torch.float16) and group.get("weight_rounding") == "stochastic":
            factor = 1.0 if factor is None else factor
            step_rounded_(p, update, factor=factor, lr=lr, step=int(self.state[p]["step"]))
            return
        if factor is not None:
            p.mul_(factor)
        p.add_(update, alpha=-lr)

    def _acceptable(self) -> Tensor:
        """() bool: the gradients are finite, and are not the zeros by which checkpointing materialises state."""
        first = self._parameters()[0]
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        if any(s.device != first.device for s in sums):
            sums = [s.to(first.device) for s in sums]
        finite = torch.stack(sums).isfinite().all()
        finite = self._ranks.all_(finite)
        self.state[first]["skipped"] += ~finite
        if any(group["lr"] for group in self.param_groups):
            return finite
        return finite & self._ranks.any_(torch.stack([g.any().to(first.device) for g in gradients]).any())

    @property
    def _ranks(self) -> Group:
        """Those that take a step together or not at all."""
        return self._owners.group
