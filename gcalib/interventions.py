"""Interventions on gated cross-attention: what is added to X in the place of gate * X' (notebook 09).

They ask whether it is orthogonality that helps, where a correlation only observes. `update` of `RunConfig` names one:

    full         gate * X', the module as it is
    orthogonal   its component orthogonal to X; the parallel one is removed, as the orthogonal residual update of
                 arXiv 2505.11881 does to the blocks of a transformer
    parallel     its component parallel to X; the orthogonal one is removed
    noise        a random direction of the same length and at the same angle to X
    other-user   made from the Y of another user (`gcalib.models.base.CrossDomainAttention`)
    linear, ffn  X' = W2 W1 X or W2 relu(W1 X) with as many weights as cross-attention, and a gate of X alone: no Y

Each component is that of a row of X, before LayerNorm; the two add up to the full update.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gcalib.alignment import components


def intervened(kind: str, x: Tensor, update: Tensor, training: bool) -> Float[Tensor, "B Lx dim"]:
    """What an intervention makes of an update of x, both (B, Lx, dim); noise is the same in every evaluation."""
    if kind not in ("orthogonal", "parallel", "noise"):
        return update
    parallel, orthogonal = components(x, update)
    if kind != "noise":
        return orthogonal if kind == "orthogonal" else parallel
    generator = None if training else torch.Generator(x.device).manual_seed(0)
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    direction = F.normalize(components(x, noise)[1], dim=-1)
    return parallel + direction * orthogonal.norm(dim=-1, keepdim=True)


def squared_cosine(recorded: Iterable[Any]) -> Tensor:
    """Mean of cos^2(X, update) over the updated rows of all recorded `Activations`, for a penalty; 0 without any."""
    rows = torch.cat([torch.cosine_similarity(one.x, one.update, dim=2)[one.updated] for one in recorded])
    return rows.square().sum() / max(1, len(rows))


class OfX(nn.Sequential):
    """X' made from X alone by two layers with the 4 dim^2 weights of cross-attention, zero where no key is visible."""

    def __init__(self, dim: int, between: nn.Module) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), between, nn.Linear(2 * dim, dim))

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B Lx dim"], y: Tensor, mask: Bool[Tensor, "B Lx Ly"]
    ) -> Float[Tensor, "B Lx dim"]:
        x_prime: Tensor = super().forward(x)
        return x_prime * mask.any(dim=2, keepdim=True)


class ConstantGate(nn.Module):
    """A gate that reads nothing: 1, or a number per feature that is learned, from 1 on."""

    def __init__(self, dim: int, learned: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim), requires_grad=learned)

    def forward(self, both: Tensor) -> Float[Tensor, "B Lx dim"]:
        return self.alpha.expand(*both.shape[:-1], -1)
