"""What a window of gradients does to a step, in figures; read at logging steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_efcp.optim.segment import Segments
from hf_efcp.parallel import Group

_TOP = 4  # eigenvalues that are reported


class Recorded:
    """A step's gradient and update, reduced on the device to what the figures need.

    EFCP quantifies preconditioning by how much `u` is longer than `g` (scaling) and by the angle between them
    (rotation); `hf_efcp` reports their ratio of norms and cosine.

    Args:
        gradients: flat vectors, one a segment; copied, as a step overwrites them.
        device: where the figures come together.
        group: the ranks over which they are summed; all of them record.
    """

    def __init__(self, gradients: list[Tensor], device: torch.device, group: Group):
        self._device, self._group = device, group
        self._gradients = [gradient.clone() for gradient in gradients]
        self.figures = {"gradient_norm": norm(gradients, device, group)}

    def precondition(self, updates: list[Tensor]) -> None:
        """Take the preconditioned gradient, before momentum and scaling."""
        pairs = zip(updates, self._gradients, strict=True)
        inner = torch.stack([torch.dot(u.double(), g.double()).to(self._device) for u, g in pairs]).sum()
        inner = self._group.sum_(inner)
        length, gradient = norm(updates, self._device, self._group), self.figures["gradient_norm"]
        self.figures["preconditioning_scale"] = length / gradient
        self.figures["preconditioning_cosine"] = inner / (length * gradient)
        self._gradients = []

    def update(self, updates: list[Tensor], segments: Segments) -> None:
        """Take the update as it is applied, before the learning rate, and the residual."""
        self.figures["update_norm"] = norm(updates, self._device, self._group)
        if self._group.size > 1:  # later a rank may be alone in asking
            residuals = [part for segment in segments for part in segment.window.residuals()]
            self.figures["residual_norm"] = norm(residuals, self._device, self._group)


Condition = Callable[[Tensor], Tensor]  # of systems, from their (…, m) ascending eigenvalues of GGᵀ


def basic_figures(
    gram: Tensor, condition: Condition, segments: Segments, recorded: Recorded | None
) -> dict[str, Tensor]:
    """Norms of gradient, update and residual, and the worst condition of the systems."""
    names = ("gradient_norm", "update_norm", "residual_norm")
    figures = {name: recorded.figures[name] for name in names if recorded and name in recorded.figures}
    residuals = [part for segment in segments for part in segment.window.residuals()]
    if residuals and segments.group.size == 1:
        figures["residual_norm"] = norm(residuals, gram.device, segments.group)
    figures["system_condition"] = condition(torch.linalg.eigvalsh(gram).clamp_min(0)).max()
    return figures


def shape_figures(
    gram: Tensor, condition: Condition, segments: Segments, recorded: Recorded | None
) -> dict[str, Tensor]:
    """Spectrum of `GGᵀ` (mean of the systems), how far a step is scaled and turned, and what compression holds back.

    `effective_rank` is `(Σλ)²/Σλ²`: m for equal eigenvalues, 1 for a single one.
    """
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0).view(-1, gram.shape[-1]).mean(0)
    figures = {"effective_rank": eigenvalues.sum().square() / eigenvalues.square().sum().clamp_min(1e-300)}
    for place, value in enumerate(eigenvalues.flip(0)[:_TOP], start=1):
        figures[f"eigenvalue_{place}"] = value
    if recorded:
        figures.update({name: value for name, value in recorded.figures.items() if name.startswith("precondition")})
        basic = basic_figures(gram, condition, segments, recorded)
        if "residual_norm" in basic:
            figures["residual_over_gradient"] = basic["residual_norm"] / basic["gradient_norm"]
    return figures


def norm(vectors: Iterable[Tensor], device: torch.device, group: Group) -> Tensor:
    """Norm of all vectors of all ranks together, () float64."""
    squares = [torch.linalg.vector_norm(v, dtype=torch.float64).square().to(device) for v in vectors]
    return group.sum_(sum(squares, torch.zeros((), dtype=torch.float64, device=device))).sqrt()
