"""How the update X' of a cross-attention stands to its input X: cosines, their null levels, and the split of X'.

The paper writes `|cos(X, X')| = (1 / (B l)) sum cos(x, x')` (arXiv 2510.09435). The bars can be read in three ways,
which are reported apart: the mean of cos, the absolute value of that mean, the mean of the absolute values. They differ
much: independent directions have a mean of 0 but a mean absolute value well above.

A cosine says something only against what it would be if X' had nothing to do with X, or if nothing had been learned:

1. `null_mean_abs`, analytic: E|cos| of two independent directions, uniform on the sphere of R^d, is
   `Gamma(d / 2) / (sqrt(pi) Gamma((d + 1) / 2))`, close to `sqrt(2 / (pi d))`: 0.100 at d = 64, 0.050 at d = 256.
2. `null_perm_signed`, `null_perm_mean_abs`, by permutation: X' of another user at the same position. It keeps what all
   users share, such as a common direction of all updates, which the analytic null knows nothing about. What is added to
   X is gate * X', whose cosine and permutation null are measured beside it (`gated_`).
3. An untrained module in the trained model: measure it with another `AlignmentMeter`. Drawn anew, it is what the
   architecture does by itself to these states. Set back to the start of the run it is no null of independence: the
   embeddings were trained through that very draw, and may have adapted to it (`gcalib.experiments` records both).

`INVARIANT_TO` declares what each measure ignores; the tests hold it to that, in both directions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Numbers of a tensor measured at a time on a CPU. So few stay in the cache, and torch does not spread them on threads,
# which would spend more time waiting for each other than computing.
BLOCK = 2**15
_ROTATION = "rotation"  # of X, X' and Y together, by one orthogonal matrix
_SCALE_X = "scale_x"  # each x by a positive number of its own
_SCALE_X_PRIME = "scale_x_prime"  # likewise each x'
_FLIP = "flip"  # the sign of all X' at once
_FLIP_EACH = "flip_each"  # the sign of each x' on its own
_DIRECTIONS = frozenset({_ROTATION, _SCALE_X, _SCALE_X_PRIME})
_SIGNS = frozenset({_FLIP, _FLIP_EACH})
INVARIANT_TO: dict[str, frozenset[str]] = {
    "cos_signed": _DIRECTIONS,
    "cos_abs_of_mean": _DIRECTIONS | {_FLIP},
    "cos_mean_abs": _DIRECTIONS | _SIGNS,
    "null_mean_abs": _DIRECTIONS | _SIGNS,
    "null_perm_signed": _DIRECTIONS,
    "null_perm_mean_abs": _DIRECTIONS | _SIGNS,
    "cos_xy_signed": _DIRECTIONS | _SIGNS,  # X' does not enter
    "cos_xy_abs_of_mean": _DIRECTIONS | _SIGNS,
    "cos_xy_mean_abs": _DIRECTIONS | _SIGNS,
    "norm_x": frozenset({_ROTATION, _SCALE_X_PRIME}) | _SIGNS,
    "norm_x_prime": frozenset({_ROTATION, _SCALE_X}) | _SIGNS,
    "norm_along": frozenset({_ROTATION, _SCALE_X}) | _SIGNS,
    "norm_across": frozenset({_ROTATION, _SCALE_X}) | _SIGNS,
    "gated_norm_along": frozenset({_SCALE_X}) | _SIGNS,  # the gate works feature by feature, which a rotation mixes
    "gated_norm_across": frozenset({_SCALE_X}) | _SIGNS,
    "gated_cos_signed": frozenset({_SCALE_X, _SCALE_X_PRIME}),
    "gated_cos_mean_abs": frozenset({_SCALE_X, _SCALE_X_PRIME}) | _SIGNS,
    "gated_null_perm_signed": frozenset({_SCALE_X, _SCALE_X_PRIME}),
    "gated_null_perm_mean_abs": frozenset({_SCALE_X, _SCALE_X_PRIME}) | _SIGNS,
}


def cosine(
    x: Float[Tensor, "batch length dim"],
    x_prime: Float[Tensor, "batch length dim"],
    mask: Bool[Tensor, "batch length"],
    *,
    y: Float[Tensor, "batch length dim"] | None = None,
    gate: Float[Tensor, "batch length dim"] | None = None,
) -> dict[str, float]:
    """Alignment of X' with X over the real positions of one batch.

    Parameters
    ----------
    x, x_prime
        Queries of a cross-attention and what it returned for them.
    mask
        True at real positions; padding may stand on either side.
    y
        What stands beside x in the other domain, zero where nothing does.
    gate
        The gate that multiplies X'.

    Returns
    -------
    dict
        - `cos_signed`, `cos_abs_of_mean`, `cos_mean_abs`: mean of cos(x, x'), its absolute value, mean of |cos|.
        - `null_mean_abs`, `null_perm_signed`, `null_perm_mean_abs`: the nulls of the module's docstring.
        - `norm_x`, `norm_x_prime`, `norm_along`, `norm_across`: mean Euclidean norms of x, of x', and of the components
          of x' along x and across it.
        - with y: `cos_xy_signed`, `cos_xy_abs_of_mean`, `cos_xy_mean_abs`, where y is not zero.
        - with gate: `gated_norm_along`, `gated_norm_across`, the same split of gate * x', which is what is added to x;
          `gated_cos_signed`, `gated_cos_mean_abs`, its cosine with x; `gated_null_perm_signed`,
          `gated_null_perm_mean_abs`, what another user's would have, each where something is let through.
        - `rows`: positions measured. `rows_without_update`, `rows_without_x`: real positions where x', or x, is exactly
          zero, so that there is no direction; they enter no cosine and no norm.

        A mean over no position at all is nan.

    Raises
    ------
    ValueError
        If shapes do not fit, no position is real, or a value at a real position is not finite.

    Examples
    --------
    One user, two positions: x' at a right angle to x, then along it.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> x_prime = torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])
    >>> found = cosine(x, x_prime, torch.tensor([[True, True]]))
    >>> found["cos_signed"], found["norm_along"], found["norm_across"], round(found["null_mean_abs"], 4)
    (0.5, 0.5, 1.5, 0.6366)
    """
    meter = AlignmentMeter()
    meter.update(x, x_prime, mask, y=y, gate=gate)
    return meter.result()


class AlignmentMeter:
    """The measures of `cosine` over many batches: `update` with each, then `result`.

    The permutation null exchanges users within a batch, so it depends on how users were batched.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # left on the device, so that no batch waits for a copy
        self._counts: dict[str, int] = {}
        self._rows = {"rows": 0, "rows_without_update": 0, "rows_without_x": 0}
        self._dim: int | None = None

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "batch length dim"],
        x_prime: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"],
        y: Float[Tensor, "batch length dim"] | None = None,
        gate: Float[Tensor, "batch length dim"] | None = None,
    ) -> None:
        """Take in one batch; see `cosine` for the arguments. A batch without a real position adds nothing.

        Raises
        ------
        ValueError
            As `cosine`, and if the width differs from that of earlier batches.
        """
        given = {"x": x, "x_prime": x_prime, "y": y, "gate": gate}
        padded = {name: values.detach() for name, values in given.items() if values is not None}
        self._check(padded, mask)
        direction = {name: _has_direction(name, values, mask) for name, values in padded.items()}
        measured = direction["x"] & direction["x_prime"]
        self._rows["rows"] += int(measured.sum())
        self._rows["rows_without_update"] += int((mask & ~direction["x_prime"]).sum())
        self._rows["rows_without_x"] += int((mask & ~direction["x"]).sum())
        flat = {name: values.reshape(-1, values.shape[2]) for name, values in padded.items()}
        step = max(1, BLOCK // x.shape[2]) if x.device.type == "cpu" else max(1, mask.numel())
        if "y" in flat:
            for rows in _places(direction["x"] & direction["y"]).split(step):
                X, Y = (flat[name].index_select(0, rows).double() for name in ("x", "y"))
                self._add_cosines("cos_xy", _dot(X, Y) / (_norm(X) * _norm(Y)))
        places = _places(measured)
        other, several = _other_user(_age(mask)[measured])
        for rows, others, exchanged in zip(
            places.split(step), places[other].split(step), several.split(step), strict=True
        ):
            # in float64, where the square of no float32 over- or underflows
            X, P, Q = (flat["x"][rows].double(), flat["x_prime"][rows].double(), flat["x_prime"][others].double())
            norm_x = _norm(X)
            U = X / norm_x.unsqueeze(1)
            self._add_cosines("cos", _dot(U, P) / _norm(P))
            self._add_cosines("null_perm", (_dot(U, Q) / _norm(Q))[exchanged])
            self._add("norm_x", norm_x)
            self._add("norm_x_prime", _norm(P))
            self._add_split("norm", U, P)
            if "gate" in flat:
                added, theirs = flat["gate"][rows].double() * P, flat["gate"][others].double() * Q
                self._add_split("gated_norm", U, added)
                self._add_cosines("gated_cos", _cosines(U, added))
                self._add_cosines("gated_null_perm", _cosines(U[exchanged], theirs[exchanged]))

    def result(self) -> dict[str, float]:
        """All measures so far, as `cosine` returns them.

        Raises
        ------
        ValueError
            If no batch had a real position.
        """
        if self._dim is None or not sum(self._rows.values()):
            raise ValueError("There is nothing to measure: the mask has no real position.")
        found = {"null_mean_abs": null_mean_abs(self._dim), **self._rows}
        for name, total in self._sums.items():
            found[name] = float(total) / (self._counts[name] or math.nan)
            if name in ("cos_signed", "cos_xy_signed"):
                found[name.replace("signed", "abs_of_mean")] = abs(found[name])
        return found

    def _check(self, given: dict[str, Tensor], mask: Tensor) -> None:
        x = given["x"]
        if x.dim() != 3 or any(values.shape != x.shape for values in given.values()):
            shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in given.items())
            raise ValueError(f"All must have one shape (batch, length, dim), but there are {shapes}.")
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool {tuple(x.shape[:2])}.")
        if self._dim not in (None, x.shape[2]):
            raise ValueError(f"x is {x.shape[2]} wide, earlier batches were {self._dim}.")
        self._dim = x.shape[2]

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + len(values)

    def _add_cosines(self, name: str, cosines: Tensor) -> None:
        self._add(f"{name}_signed", cosines)
        self._add(f"{name}_mean_abs", cosines.abs())

    def _add_split(self, name: str, unit: Tensor, update: Tensor) -> None:
        """Norms of the component of `update` along a unit vector, `(update . unit) unit`, and of the rest."""
        along = _dot(update, unit)
        self._add(f"{name}_along", along.abs())
        self._add(f"{name}_across", _norm(update - along.unsqueeze(1) * unit))


def null_mean_abs(dim: int) -> float:
    """E|cos| of two independent uniform directions in R^dim: `Gamma(dim / 2) / (sqrt(pi) Gamma((dim + 1) / 2))`.

    >>> round(null_mean_abs(64), 4), round(math.sqrt(2 / (math.pi * 64)), 4)
    (0.1001, 0.0997)
    """
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def _has_direction(
    name: str, values: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]
) -> Bool[Tensor, "batch length"]:
    """Which real positions are not exactly zero; raises at one that is not finite."""
    largest = values.abs().amax(dim=2).masked_fill(~mask, 0)  # whatever stands on pads
    if not torch.isfinite(largest).all():
        place = (~torch.isfinite(largest)).nonzero()[0].tolist()
        raise ValueError(f"{name} is not finite at (user, position) {tuple(place)}.")
    return largest > 0


def _places(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " rows"]:
    return mask.flatten().nonzero().squeeze(1)


def _dot(first: Float[Tensor, "rows dim"], second: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    return (first * second).sum(dim=1)


def _norm(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    return _dot(rows, rows).sqrt()  # several times faster than torch's norm of float64 rows


def _cosines(unit: Float[Tensor, "rows dim"], update: Float[Tensor, "rows dim"]) -> Float[Tensor, " some_rows"]:
    """Cosines with unit vectors, of the rows that have a direction: a gate may let nothing through."""
    length = _norm(update)
    return (_dot(unit, update) / length)[length > 0]


def _age(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """1 for a user's newest real position, 2 for the one before: the same wherever the padding stands."""
    return mask.flip(1).cumsum(dim=1).flip(1)


def _other_user(age: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """For each row the next row of the same age, the last one being followed by the first.

    No user has two rows of one age, so the next row is another user's, unless it is the row itself: the second result
    is False there.
    """
    order = torch.argsort(age, stable=True)
    sorted_age = age[order]
    _, group, counts = torch.unique_consecutive(sorted_age, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(age), device=age.device)
    following = torch.where(place + 1 < (first + counts)[group], place + 1, first[group])
    other = torch.empty_like(order)
    other[order] = order[following]
    several = torch.empty_like(order, dtype=torch.bool)
    several[order] = counts[group] > 1
    return other, several
