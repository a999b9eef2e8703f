"""Alignment: by hand, against simulation, and the transformations that each measure ignores."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from gcalib import alignment
from gcalib.alignment import AlignmentMeter, null_mean_abs

cosine = jaxtyped(typechecker=beartype)(alignment.cosine)
COUNTS = {"rows", "rows_without_update", "rows_without_x"}
# rotation of X, X' and Y together; each x, or x', by a positive number of its own; sign of all X', of each x', of a
# feature of X' and of its gate
CHANGES = ("rotation", "scale_x", "scale_x_prime", "flip", "flip_each", "flip_features")
DIRECTIONS, SCALES, SIGNS, FEATURES = set(CHANGES[:3]), set(CHANGES[1:3]), set(CHANGES[3:5]), set(CHANGES[5:])
INVARIANT_TO = {
    "cos_signed": DIRECTIONS,
    "cos_abs_of_mean": DIRECTIONS | {"flip"},
    "cos_mean_abs": DIRECTIONS | SIGNS,
    "null_mean_abs": DIRECTIONS | SIGNS | FEATURES,
    "null_perm_signed": DIRECTIONS,
    "null_perm_mean_abs": DIRECTIONS | SIGNS,
    "cos_xy_signed": DIRECTIONS | SIGNS | FEATURES,
    "cos_xy_abs_of_mean": DIRECTIONS | SIGNS | FEATURES,
    "cos_xy_mean_abs": DIRECTIONS | SIGNS | FEATURES,
    "cos_xy_r": DIRECTIONS,
    "norm_x": {"rotation", "scale_x_prime"} | SIGNS | FEATURES,
    "norm_x_prime": {"rotation", "scale_x"} | SIGNS | FEATURES,
    "norm_parallel": {"rotation", "scale_x"} | SIGNS,
    "norm_orthogonal": {"rotation", "scale_x"} | SIGNS,
    "gated_norm_parallel": {"scale_x"} | SIGNS | FEATURES,  # a gate works feature by feature, which a rotation mixes
    "gated_norm_orthogonal": {"scale_x"} | SIGNS | FEATURES,
    "gated_cos_signed": SCALES | FEATURES,
    "gated_cos_abs_of_mean": SCALES | {"flip"} | FEATURES,
    "gated_cos_mean_abs": SCALES | SIGNS | FEATURES,
    "gated_null_perm_signed": SCALES | FEATURES,
    "gated_null_perm_mean_abs": SCALES | SIGNS | FEATURES,
    "fixed_cos_signed": SCALES | FEATURES,
    "fixed_cos_abs_of_mean": SCALES | {"flip"} | FEATURES,
    "fixed_null_perm_signed": SCALES | FEATURES,
}


def draw(seed: int, batch: int = 4, length: int = 5, dim: int = 6) -> dict[str, torch.Tensor]:
    """A left-padded batch in which some x' and some y are zero; pads hold nan."""
    rng = torch.Generator().manual_seed(seed)
    x, x_prime, y, gate = (torch.randn(batch, length, dim, generator=rng, dtype=torch.float64) for _ in range(4))
    mask = torch.arange(length) >= length - torch.randint(1, length + 1, (batch, 1), generator=rng)
    x_prime += 0.5  # a direction shared by all, so that no mean is zero by chance
    x += 0.5
    x_prime[0, -1] = 0
    y[batch // 2, -1] = 0
    for values in (x, x_prime, y, gate):
        values[~mask] = math.nan
    return {"x": x, "x_prime": x_prime, "mask": mask, "y": y, "gate": gate}


def changed(batch: dict[str, torch.Tensor], change: str, seed: int) -> dict[str, torch.Tensor]:
    """The batch after one of CHANGES."""
    rng = torch.Generator().manual_seed(seed)
    x, x_prime, y = batch["x"], batch["x_prime"], batch["y"]
    own = torch.rand(*x.shape[:2], 1, generator=rng, dtype=torch.float64) * 10 + 0.1
    if change == "rotation":
        Q, _ = torch.linalg.qr(torch.randn(x.shape[2], x.shape[2], generator=rng, dtype=torch.float64))
        return {**batch, "x": x @ Q, "x_prime": x_prime @ Q, "y": y @ Q}
    if change == "scale_x":
        return {**batch, "x": x * own}
    if change == "flip_features":
        signs = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
        return {**batch, "x_prime": x_prime * signs, "gate": batch["gate"] * signs}
    by = {"scale_x_prime": own, "flip": -1.0, "flip_each": torch.where(own > 5, 1.0, -1.0)}[change]
    return {**batch, "x_prime": x_prime * by}


def test_every_measure_has_its_invariances():
    assert set(cosine(**draw(0))) == set(INVARIANT_TO) | COUNTS


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(CHANGES))
def test_measures_ignore_what_they_are_invariant_to(seed, change):
    batch = draw(seed)
    before, after = cosine(**batch), cosine(**changed(batch, change, seed))
    for name in (name for name, ignored in INVARIANT_TO.items() if change in ignored):
        assert after[name] == pytest.approx(before[name], abs=1e-10, nan_ok=True), name


@pytest.mark.parametrize("change", CHANGES)
def test_measures_notice_all_else(change):
    batch = draw(3)
    before, after = cosine(**batch), cosine(**changed(batch, change, 3))
    for name in (name for name, ignored in INVARIANT_TO.items() if change not in ignored):
        assert abs(after[name] - before[name]) > 1e-3, name


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_components_are_parallel_orthogonal_and_complete(seed):
    rng = torch.Generator().manual_seed(seed)
    x, update = torch.randn(2, 3, 4, 5, generator=rng, dtype=torch.float64)
    x[0, 0] = 0
    parallel, orthogonal = alignment.components(x, update)
    assert torch.allclose(parallel + orthogonal, update)
    assert (x * orthogonal).sum(-1).abs().max() < 1e-12
    alike = torch.cosine_similarity(x, parallel, dim=-1).abs()
    assert torch.allclose(alike.flatten()[1:], torch.ones(11, dtype=torch.float64))
    assert torch.equal(orthogonal[0, 0], update[0, 0])


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_three_readings_are_in_order(seed):
    found = cosine(**draw(seed))
    assert found["fixed_cos_abs_of_mean"] == abs(found["fixed_cos_signed"]) <= 1
    for name in ("cos", "cos_xy", "gated_cos"):
        assert found[f"{name}_abs_of_mean"] == abs(found[f"{name}_signed"])
        assert 0 <= found[f"{name}_abs_of_mean"] <= found[f"{name}_mean_abs"] + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize("pads", ["left", "right"])
def test_cosine_by_hand(pads):
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]], [[9.0, 9.0], [9.0, 9.0], [3.0, 0.0]]])
    x_prime = torch.tensor([[[9.0, 9.0], [-2.0, 0.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0], [0.0, 5.0]]])
    y = torch.tensor([[[9.0, 9.0], [5.0, 0.0], [-1.0, 0.0]], [[9.0, 9.0], [9.0, 9.0], [0.0, 0.0]]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    batch = {"x": x, "x_prime": x_prime, "y": y, "gate": torch.tensor([0.5, -1.0]).expand(2, 3, 2)}
    if pads == "right":
        left, mask = mask, torch.tensor([[True, True, False], [True, False, False]])
        batch = {name: torch.zeros(2, 3, 2).masked_scatter(mask[..., None], t[left]) for name, t in batch.items()}
    # cosines -1, 0.8, 0; x' splits into 2 + 0, 4 + 3, 0 + 5; gated into 1 + 0, 4 + 1.5, 0 + 5; with signs +, - fixed
    # -1, -0.8, 0
    assert cosine(mask=mask, **batch) == pytest.approx({
        "cos_signed": -0.2 / 3,
        "cos_abs_of_mean": 0.2 / 3,
        "cos_mean_abs": 1.8 / 3,
        "norm_x": 2.0,
        "norm_x_prime": 4.0,
        "norm_parallel": 2.0,
        "norm_orthogonal": 8 / 3,
        "gated_norm_parallel": 5 / 3,
        "gated_norm_orthogonal": 6.5 / 3,
        "gated_cos_signed": (-1 - 4 / 18.25**0.5) / 3,
        "gated_cos_abs_of_mean": (1 + 4 / 18.25**0.5) / 3,
        "gated_cos_mean_abs": (1 + 4 / 18.25**0.5) / 3,
        "gated_null_perm_signed": (-1 + 1.5 / 18.25**0.5) / 2,
        "gated_null_perm_mean_abs": (1 + 1.5 / 18.25**0.5) / 2,
        "cos_xy_signed": 0.5,
        "cos_xy_abs_of_mean": 0.5,
        "cos_xy_mean_abs": 0.5,
        "cos_xy_r": -1.0,  # over two rows: (1, -1) and (0, 0.8)
        "fixed_cos_signed": -0.6,
        "fixed_cos_abs_of_mean": 0.6,
        "fixed_null_perm_signed": -0.2,
        # only at the newest position are there two users: cos((0, 2), (0, 5)) = 1 and cos((3, 0), (3, 4)) = 0.6
        "null_perm_signed": 0.8,
        "null_perm_mean_abs": 0.8,
        "null_mean_abs": 2 / math.pi,
        "rows": 3,
        "rows_without_update": 0,
        "rows_without_x": 0,
    })  # fmt: skip


def test_the_permutation_takes_the_next_user_of_the_same_age():
    x = torch.eye(4).unsqueeze(1).repeat(1, 3, 1)  # user i looks in direction i
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    x_prime = x.roll(1, dims=0)  # and user i + 1's update is user i's direction
    found = cosine(x, x_prime, mask)
    # newest: 0 1 2 3 in a ring, all fit; before: 0 1 2, of which 2 -> 0 does not; oldest: 0 2, neither fits
    assert found["null_perm_signed"] == pytest.approx((4 + 2 + 0) / 9)


def test_rows_without_a_direction_are_counted_not_measured():
    batch = draw(1)
    batch["x"][2, -1] = 0
    found = cosine(**batch)
    assert (found["rows_without_update"], found["rows_without_x"]) == (1, 1)
    assert found["rows"] == int(batch["mask"].sum()) - 2
    batch["mask"][0, -1] = batch["mask"][2, -1] = False
    # without these rows ages shift, which only the permutation notices
    again = cosine(**batch)
    for name in ("cos_signed", "norm_x", "norm_orthogonal", "gated_norm_parallel"):
        assert again[name] == pytest.approx(found[name])


def test_a_gate_that_lets_nothing_through_has_no_cosine():
    batch = draw(1)
    shut = torch.zeros_like(batch["gate"])
    found = cosine(**{**batch, "gate": shut})
    assert math.isnan(found["gated_cos_mean_abs"])
    assert math.isnan(found["gated_null_perm_mean_abs"])
    shut[1, -1] = batch["gate"][1, -1]  # but for one row
    found = cosine(**{**batch, "gate": shut})
    added, x = (batch["gate"] * batch["x_prime"])[1, -1], batch["x"][1, -1]
    assert found["gated_cos_signed"] == pytest.approx(float(added @ x / (added.norm() * x.norm())))
    assert found["gated_norm_parallel"] > 0


def test_no_update_anywhere_is_nan_with_its_count():
    x = torch.ones(2, 3, 4)
    found = cosine(x, torch.zeros_like(x), torch.ones(2, 3, dtype=torch.bool))
    assert (found["rows"], found["rows_without_update"]) == (0, 6)
    assert math.isnan(found["cos_mean_abs"])
    assert math.isnan(found["norm_orthogonal"])


def test_a_lone_user_has_no_permutation():
    batch = draw(5, batch=1)
    batch["x_prime"][0, -1] = 1.0
    found = cosine(**batch)
    assert math.isnan(found["null_perm_mean_abs"])
    assert math.isfinite(found["cos_mean_abs"])


def test_the_permutation_shows_a_direction_that_all_updates_share():
    rng = torch.Generator().manual_seed(0)
    x, x_prime = torch.randn(2, 200, 1, 64, generator=rng) + 1.0
    mask = torch.ones(200, 1, dtype=torch.bool)
    found = cosine(x, x_prime, mask)
    assert found["cos_mean_abs"] == pytest.approx(found["null_perm_mean_abs"], abs=0.02)
    assert found["null_perm_mean_abs"] > 4 * found["null_mean_abs"]
    found = cosine(x - 1.0, x_prime, mask)  # and none where there is none
    assert found["null_perm_mean_abs"] == pytest.approx(found["null_mean_abs"], rel=0.15)


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 256])
def test_the_analytic_null_is_what_random_directions_show(dim):
    rng = torch.Generator().manual_seed(dim)
    first, second = torch.randn(2, 20_000, dim, generator=rng, dtype=torch.float64)
    drawn = torch.cosine_similarity(first, second).abs()
    assert null_mean_abs(dim) == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 20_000**0.5 + 1e-12)


@pytest.mark.parametrize(("dim", "exact"), [(1, 1.0), (2, 2 / math.pi), (3, 0.5), (4, 4 / (3 * math.pi))])
def test_the_analytic_null_by_hand(dim, exact):
    assert null_mean_abs(dim) == pytest.approx(exact)


def test_the_meter_averages_over_rows_not_over_batches():
    batches = [draw(0), draw(1, batch=7)]
    meter = AlignmentMeter()
    for batch in batches:
        meter.update(**batch)
    found, single = meter.result(), [cosine(**batch) for batch in batches]
    assert found["rows"] == sum(one["rows"] for one in single)
    for name in ("cos_signed", "cos_mean_abs", "norm_orthogonal", "gated_norm_parallel"):
        assert found[name] == pytest.approx(sum(one[name] * one["rows"] for one in single) / found["rows"])
    assert found["cos_abs_of_mean"] == abs(found["cos_signed"])


def meter_of(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    meter = AlignmentMeter()
    for batch in batches:
        meter.update(**batch)
    return meter.result()


def rows_of(batches: list[dict[str, torch.Tensor]], *names: str) -> list[torch.Tensor]:
    """The rows of all batches at which x and x' have a direction."""
    measured = [(b["x"].nan_to_num().norm(dim=2) > 0) & (b["x_prime"].nan_to_num().norm(dim=2) > 0) for b in batches]
    return [torch.cat([b[name][rows] for b, rows in zip(batches, measured, strict=True)]) for name in names]


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_fixed_signs_are_those_of_the_mean_gate_over_all_batches(seed):
    batches = [draw(seed), draw(seed + 1, batch=7), draw(seed + 2, batch=2)]
    x, x_prime, gate = rows_of(batches, "x", "x_prime", "gate")
    signs = gate.mean(dim=0).sign()
    found = meter_of(batches)
    direct = torch.cosine_similarity(x, signs * x_prime).mean()
    assert found["fixed_cos_signed"] == pytest.approx(float(direct), abs=1e-12)
    fixed = meter_of([{**batch, "x_prime": signs * batch["x_prime"]} for batch in batches])
    assert found["fixed_null_perm_signed"] == pytest.approx(fixed["null_perm_signed"], abs=1e-12, nan_ok=True)


def test_fixed_signs_are_not_those_of_single_batches():
    batches = [draw(0), draw(1, batch=7), draw(2, batch=2)]
    alone = [cosine(**batch) for batch in batches]
    mean = sum(one["fixed_cos_signed"] * one["rows"] for one in alone) / sum(one["rows"] for one in alone)
    assert abs(meter_of(batches)["fixed_cos_signed"] - mean) > 0.01


def test_fixed_signs_of_a_positive_gate_leave_the_cosine():
    batches = [{**batch, "gate": batch["gate"].sigmoid()} for batch in (draw(0), draw(1, batch=7))]
    found = meter_of(batches)
    for name in ("cos_signed", "cos_abs_of_mean", "null_perm_signed"):
        assert found[f"fixed_{name}"] == pytest.approx(found[name], abs=1e-12)
        assert abs(found[name]) > 0.01


def test_fixed_cosine_needs_a_gate():
    batch = draw(0)
    del batch["gate"]
    assert not [name for name in cosine(**batch) if "fixed" in name or "gated" in name]


def test_what_was_added_decides_the_gated_measures():
    batch = draw(3)
    added = batch["gate"] * batch["x_prime"]
    other = added.flip(2)
    whole, same, changed = (meter_of([{**batch, **given}]) for given in ({}, {"update": added}, {"update": other}))
    assert same == pytest.approx(whole)
    x, update = rows_of([{**batch, "update": other}], "x", "update")
    assert changed["gated_cos_signed"] == pytest.approx(float(torch.cosine_similarity(x, update).mean()))
    for name, value in changed.items():
        assert ("gated_" in name) != (value == pytest.approx(whole[name])), name


def test_correlation_of_the_cosines_is_pearson_s_over_all_rows():
    batches = [draw(0), draw(1, batch=7)]
    x, x_prime, y = rows_of(batches, "x", "x_prime", "y")
    beside = y.norm(dim=1) > 0
    pair = [torch.cosine_similarity(x, other)[beside] for other in (y, x_prime)]
    assert 0 < beside.sum() < len(beside)
    assert meter_of(batches)["cos_xy_r"] == pytest.approx(float(torch.corrcoef(torch.stack(pair))[0, 1]))


def test_a_batch_without_real_positions_adds_nothing():
    batch = draw(2)
    meter = AlignmentMeter()
    meter.update(**{**batch, "mask": torch.zeros_like(batch["mask"])})
    with pytest.raises(ValueError, match="no real position"):
        meter.result()
    meter.update(**batch)
    assert meter.result() == pytest.approx(cosine(**batch))


def test_blocks_change_nothing(monkeypatch):
    whole = cosine(**draw(7))
    monkeypatch.setattr(alignment, "BLOCK", 12)
    assert cosine(**draw(7)) == pytest.approx(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_measured_in_double(dtype):
    batch = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in draw(4).items()}
    exact = {k: v if v.dtype == torch.bool else v.double() for k, v in batch.items()}
    assert cosine(**batch) == cosine(**exact)


def test_squares_of_extreme_float32_neither_vanish_nor_overflow():
    x, x_prime = torch.tensor([[[1e-30, 1e-30]]]), torch.tensor([[[3e30, 0.0]]])
    found = cosine(x, x_prime, torch.tensor([[True]]))
    assert found["cos_signed"] == pytest.approx(math.sqrt(0.5))
    assert found["norm_orthogonal"] == pytest.approx(3e30 * math.sqrt(0.5))


def test_measuring_changes_no_argument_and_needs_no_detach():
    batch = draw(6)
    before = {name: values.clone() for name, values in batch.items()}
    cosine(**{**batch, "x": batch["x"].clone().requires_grad_()})
    for name, values in batch.items():
        assert torch.equal(values.nan_to_num(7), before[name].nan_to_num(7))


def test_refusals():
    batch = draw(0)
    x, x_prime, mask = batch["x"], batch["x_prime"], batch["mask"]
    with pytest.raises(ValueError, match="one shape"):
        alignment.cosine(x, x_prime[:, :-1], mask)
    with pytest.raises(ValueError, match=r"'y': \(4, 5, 5\)"):
        alignment.cosine(x, x_prime, mask, y=batch["y"][..., :-1])
    with pytest.raises(ValueError, match="must be torch.bool"):
        alignment.cosine(x, x_prime, mask.long())
    with pytest.raises(ValueError, match="no real position"):
        alignment.cosine(x, x_prime, torch.zeros_like(mask))
    x_prime[1, -1, 0] = math.inf
    with pytest.raises(ValueError, match=r"x_prime is not finite at \(user, position\) \(1, 4\)"):
        alignment.cosine(x, x_prime, mask)


def test_docstring_examples():
    result = doctest.testmod(alignment)
    assert (result.attempted, result.failed) == (6, 0)
