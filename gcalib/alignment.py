"""How the update X' of a cross-attention stands to its input X: cosines, null levels, components.

The paper writes `|cos(X, X')| = (1 / (B l)) sum cos(x, x')` (arXiv 2510.09435). Three readings of it are reported:
the mean of cos, the absolute value of that mean, and the mean of the absolute values. They differ much: independent
directions have a mean of 0 but a mean absolute value well above.

A cosine says something only against what it would be if X' had nothing to do with X, or if nothing had been learned:

1. `null_mean_abs`, analytic: E|cos| of two independent directions, uniform on the sphere of R^d, is
   `Gamma(d / 2) / (sqrt(pi) Gamma((d + 1) / 2))`, close to `sqrt(2 / (pi d))`: 0.100 at d = 64, 0.050 at d = 256.
2. `null_perm_signed`, `null_perm_mean_abs`, by permutation: X' of another user, as many events before the newest. It
   keeps what all users share, such as a common direction of all updates, which the analytic null ignores.
3. An untrained module in the trained model, measured with another `AlignmentMeter`. Re-initialised, it shows what the
   architecture does by itself to these states. With its initial weights it is no null of independence: the embeddings
   were trained through them, and may have adapted.

**The sign of a tanh gate.** With a tanh gate, flipping the sign of feature j of X' (a row of the output projection) and
of the gate (a row of its last layer) leaves gate * X' as it was, and changes cos(X, X'). The function that the model
computes does not say which of the two it is: every pattern of signs is as likely at the start, and training keeps the
symmetry. What is determined is the cosine of X with gate * X' (`gated_cos_*`), and the one with the signs of X' set by
the sign of each feature's mean gate (`fixed_cos_*`). A sigmoid gate is positive, and has no such freedom.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot, vector_norm

States = Float[Tensor, "batch length dim"]
Mask = Bool[Tensor, "batch length"]
# Numbers measured at a time on a CPU: they stay in the cache, and torch does not spread so few over threads.
BLOCK = 2**15


def cosine(
    x: States, x_prime: States, mask: Mask, *, y: States | None = None, gate: States | None = None
) -> dict[str, float]:
    """Alignment of X' with X over the real positions of one batch.

    Parameters
    ----------
    x, x_prime
        (B, L, D), queries of a cross-attention and what it returned for them.
    mask
        (B, L), True at real positions; padding may stand on either side.
    y, gate
        (B, L, D), what stands beside x in the other domain, zero where nothing does; the gate that multiplies X'.

    Returns
    -------
    dict
        - `cos_signed`, `cos_abs_of_mean`, `cos_mean_abs`: mean of cos(x, x'), its absolute value, mean of |cos|.
        - `null_mean_abs`, `null_perm_signed`, `null_perm_mean_abs`: the nulls of the module's docstring.
        - `norm_x`, `norm_x_prime`, `norm_parallel`, `norm_orthogonal`: mean Euclidean norms of x, of x', and of the
          components of x' parallel and orthogonal to x.
        - with y: `cos_xy_signed`, `cos_xy_abs_of_mean`, `cos_xy_mean_abs`, where y is not zero; `cos_xy_r`, Pearson's
          correlation over positions of cos(x, y) with cos(x, x').
        - with gate: `gated_norm_parallel`, `gated_norm_orthogonal`, the components of gate * x', which is what is added
          to x; `gated_cos_signed`, `gated_cos_abs_of_mean`, `gated_cos_mean_abs`, its cosine with x;
          `gated_null_perm_signed`, `gated_null_perm_mean_abs`, what another user's would have, each where the gate lets
          something through; `fixed_cos_signed`, `fixed_cos_abs_of_mean`, `fixed_null_perm_signed`, the mean of cos(x,
          x') and its null with each feature of x' signed by its mean gate.
        - `rows`: positions measured. `rows_without_update`, `rows_without_x`: real positions where x', or x, is exactly
          zero, so that there is no direction; they enter no mean. A mean over no position at all is nan.

    Raises
    ------
    ValueError
        If shapes do not fit, no position is real, or a value at a real position is not finite.

    Examples
    --------
    One user, two positions: x' orthogonal to x, then parallel to it.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> x_prime = torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])
    >>> found = cosine(x, x_prime, torch.tensor([[True, True]]))
    >>> found["cos_signed"], found["norm_parallel"], found["norm_orthogonal"], round(found["null_mean_abs"], 4)
    (0.5, 0.5, 1.5, 0.6366)
    """
    meter = AlignmentMeter()
    meter.update(x, x_prime, mask, y=y, gate=gate)
    return meter.result()


class AlignmentMeter:
    """The measures of `cosine` over many batches. The permutation null exchanges users within each batch."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # sum, sum of absolute values, number of rows; they stay on the device
        self._rows = {"rows": 0, "rows_without_update": 0, "rows_without_x": 0}
        self._dim = 0
        self._by_feature: dict[str, Tensor] = {}  # sums over rows of what each feature adds to the cosine, and the gate
        self._moments = torch.zeros(())  # (3, 3), products summed over rows: of 1, cos(x, y) and cos(x, x')

    @torch.no_grad()
    def update(
        self, x: States, x_prime: States, mask: Mask, *, y: States | None = None, gate: States | None = None,
        update: States | None = None,
    ) -> None:  # fmt: skip
        """Take in one batch. Arguments and errors are those of `cosine`; `update` is what was added to x, if another
        than gate * x_prime.
        """
        optional = {"y": y, "gate": gate, "update": update}
        given = {"x": x, "x_prime": x_prime, **{name: value for name, value in optional.items() if value is not None}}
        nonzero = _nonzero(given, mask)
        self._dim = x.shape[2]
        measured = nonzero["x"] & nonzero["x_prime"]
        self._rows["rows"] += int(measured.sum())
        self._rows["rows_without_update"] += int((mask & ~nonzero["x_prime"]).sum())
        self._rows["rows_without_x"] += int((mask & ~nonzero["x"]).sum())
        flat = {name: values.flatten(0, 1) for name, values in given.items()}  # (B L, D)

        def take(name: str, rows: Tensor) -> Tensor:
            return flat[name].index_select(0, rows).double()  # in float64 no square of a float32 over- or underflows

        found = defaultdict(list)  # name: blocks of one number a row, nan where it has none
        step = max(1, BLOCK // x.shape[2]) if x.device.type == "cpu" else max(1, mask.numel())
        if y is not None:
            for rows in (nonzero["x"] & nonzero["y"]).flatten().nonzero()[:, 0].split(step):
                found["cos_xy"].append(_cosine(take("x", rows), take("y", rows)))
        for rows, others in zip(*(part.split(step) for part in _permuted(mask, measured)), strict=True):
            X, own, theirs = take("x", rows), take("x_prime", rows), take("x_prime", others)
            found["norm_x"].append(vector_norm(X, dim=1))
            found["norm_x_prime"].append(vector_norm(own, dim=1))
            pairs = {"": (own, theirs)}
            if gate is not None:
                gates = take("gate", rows)
                pairs["gated_"] = (gates * own, take("gate", others) * theirs)
                if update is not None:
                    pairs["gated_"] = (take("update", rows), take("update", others))
                shares = X / found["norm_x"][-1].unsqueeze(1)
                self._add("gate", gates)
                self._add("cos", shares * own / found["norm_x_prime"][-1].unsqueeze(1))
                of_others = shares * theirs / vector_norm(theirs, dim=1, keepdim=True)
                self._add("null_perm", of_others[rows != others])
            if y is not None:
                xy = _cosine(X, take("y", rows))
                each = torch.stack([torch.ones_like(xy), xy, _cosine(X, own)])[:, ~xy.isnan()]
                self._moments = self._moments + each @ each.T
            for prefix, (own, theirs) in pairs.items():
                parallel, orthogonal = components(X, own)
                found[f"{prefix}norm_parallel"].append(vector_norm(parallel, dim=1))
                found[f"{prefix}norm_orthogonal"].append(vector_norm(orthogonal, dim=1))
                found[f"{prefix}cos"].append(_cosine(X, own))
                permuted = _cosine(X, theirs).masked_fill(rows == others, math.nan)
                found[f"{prefix}null_perm"].append(permuted)
        for name, blocks in found.items():
            numbers = torch.cat(blocks)
            total = torch.stack([numbers.nansum(), numbers.abs().nansum(), (~numbers.isnan()).sum()])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def _add(self, name: str, rows: Tensor) -> None:
        self._by_feature[name] = self._by_feature.get(name, 0.0) + rows.sum(dim=0)

    def result(self) -> dict[str, float]:
        """All measures so far, as `cosine` returns them; a ValueError if no batch had a real position."""
        if not any(self._rows.values()):
            raise ValueError("There is nothing to measure: the mask has no real position.")
        found = {"null_mean_abs": null_mean_abs(self._dim), **self._rows}
        for name, totals in self._totals.items():
            mean, mean_abs, _ = (totals / totals[2]).tolist()
            found |= {name: mean} if "norm" in name else {f"{name}_signed": mean, f"{name}_mean_abs": mean_abs}
            if "cos" in name:
                found[f"{name}_abs_of_mean"] = abs(mean)
        if "cos_xy" in self._totals:
            (_, u, v), (_, uu, uv), (_, _, vv) = (self._moments / self._moments[0, 0]).tolist()
            spread = (uu - u * u) * (vv - v * v)
            found["cos_xy_r"] = (uv - u * v) / math.sqrt(spread) if spread > 1e-24 else math.nan
        if self._by_feature:
            signs = self._by_feature["gate"].sign()
            for name in ("cos", "null_perm"):
                count = self._totals[name][2]
                found[f"fixed_{name}_signed"] = float((signs * self._by_feature[name]).sum() / count)
            found["fixed_cos_abs_of_mean"] = abs(found["fixed_cos_signed"])
        return found


def components(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Components of an update, such as X', parallel and orthogonal to x: `(x . update / x . x) x` and the rest.

    Parameters
    ----------
    x, update
        (B, L, D), or any (..., D). Where x is zero, all of the update counts as orthogonal.

    Examples
    --------
    >>> components(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 1.0]))
    (tensor([0., 1.]), tensor([3., 0.]))
    """
    squared = vecdot(x, x)
    share = vecdot(x, update) / squared.where(squared > 0, 1.0)
    parallel = share.unsqueeze(-1) * x
    return parallel, update - parallel


def null_mean_abs(dim: int) -> float:
    """E|cos| of two independent uniform directions in R^dim: `Gamma(dim / 2) / (sqrt(pi) Gamma((dim + 1) / 2))`.

    >>> round(null_mean_abs(64), 4), round(math.sqrt(2 / (math.pi * 64)), 4)
    (0.1001, 0.0997)
    """
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def _nonzero(given: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """For each tensor, the real positions at which it is not exactly zero. Refuses what cannot be measured."""
    shapes = {name: tuple(values.shape) for name, values in given.items()}
    if len(shapes["x"]) != 3 or len(set(shapes.values())) > 1:
        raise ValueError(f"All must have one shape (batch, length, dim), but the shapes are {shapes}.")
    if mask.dtype != torch.bool or mask.shape != shapes["x"][:2]:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool {shapes['x'][:2]}.")
    largest = {name: values.abs().amax(dim=2).masked_fill(~mask, 0) for name, values in given.items()}
    for name, values in largest.items():
        for user, position in (~values.isfinite()).nonzero()[:1].tolist():
            raise ValueError(f"{name} is not finite at (user, position) ({user}, {position}).")
    return {name: values > 0 for name, values in largest.items()}


def _cosine(x: Float[Tensor, "rows dim"], other: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """Cosine of each row, nan where one of the two is zero."""
    return vecdot(x, other) / (vector_norm(x, dim=1) * vector_norm(other, dim=1))


def _permuted(mask: Mask, measured: Mask) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Rows measured and, for each, the next user's row of the same age: the row itself if no other user has one."""
    age = mask.flip(1).cumsum(dim=1).flip(1)[measured]  # 1 at a user's newest event, on whichever side the pads are
    age, order = age.sort(stable=True)
    users = age.unique_consecutive(return_counts=True)[1]  # how many have a row of that age
    following = torch.arange(1, len(age) + 1, device=age.device)
    following[users.cumsum(0) - 1] -= users
    rows = measured.flatten().nonzero()[:, 0][order]
    return rows, rows[following]
