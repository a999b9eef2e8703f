"""Alignment: by hand, against simulation, and held to the invariances that the measures declare."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from gcalib import alignment
from gcalib.alignment import INVARIANT_TO, AlignmentMeter, null_mean_abs

cosine = jaxtyped(typechecker=beartype)(alignment.cosine)
COUNTS = {"rows", "rows_without_update", "rows_without_x"}
CHANGES = ("rotation", "scale_x", "scale_x_prime", "flip", "flip_each")


def draw(seed: int, batch: int = 4, length: int = 5, dim: int = 6) -> dict[str, torch.Tensor]:
    """A left-padded batch in which some x' and some y are zero; pads hold rubbish."""
    rng = torch.Generator().manual_seed(seed)
    x, x_prime, y, gate = (torch.randn(batch, length, dim, generator=rng, dtype=torch.float64) for _ in range(4))
    real = torch.randint(1, length + 1, (batch, 1), generator=rng)
    mask = torch.arange(length) >= length - real
    x_prime += 0.5  # a direction shared by all, so that no mean is zero by chance
    x += 0.5
    x_prime[0, -1] = 0
    y[batch // 2, -1] = 0
    for values in (x, x_prime, y, gate):
        values[~mask] = math.nan
    return {"x": x, "x_prime": x_prime, "mask": mask, "y": y, "gate": gate}


def changed(batch: dict[str, torch.Tensor], change: str, seed: int) -> dict[str, torch.Tensor]:
    """The batch under one of the transformations that `INVARIANT_TO` names."""
    rng = torch.Generator().manual_seed(seed)
    x, x_prime, y = batch["x"], batch["x_prime"], batch["y"]
    own = torch.rand(*x.shape[:2], 1, generator=rng, dtype=torch.float64) * 10 + 0.1
    signs = torch.randint(0, 2, (*x.shape[:2], 1), generator=rng) * 2.0 - 1.0
    if change == "rotation":
        Q, _ = torch.linalg.qr(torch.randn(x.shape[2], x.shape[2], generator=rng, dtype=torch.float64))
        x, x_prime, y = x @ Q, x_prime @ Q, y @ Q
    elif change == "scale_x":
        x = x * own
    elif change == "scale_x_prime":
        x_prime = x_prime * own
    elif change == "flip":
        x_prime = -x_prime
    elif change == "flip_each":
        x_prime = x_prime * signs
    return {**batch, "x": x, "x_prime": x_prime, "y": y}


def test_every_measure_declares_its_invariances():
    assert set(cosine(**draw(0))) == set(INVARIANT_TO) | COUNTS


@given(st.integers(0, 10_000), st.sampled_from(CHANGES))
def test_measures_ignore_what_they_declare_to(seed, change):
    batch = draw(seed)
    before, after = cosine(**batch), cosine(**changed(batch, change, seed))
    for name, invariances in INVARIANT_TO.items():
        if change in invariances:
            assert after[name] == pytest.approx(before[name], abs=1e-10, nan_ok=True), name


@pytest.mark.parametrize("change", CHANGES)
def test_measures_notice_what_they_do_not_declare(change):
    batch = draw(3)
    before, after = cosine(**batch), cosine(**changed(batch, change, 3))
    for name, invariances in INVARIANT_TO.items():
        if change not in invariances:
            assert abs(after[name] - before[name]) > 1e-3, name


@given(st.integers(0, 10_000))
def test_the_split_is_orthogonal_and_complete(seed):
    batch = draw(seed, batch=1, length=1)
    batch["x_prime"] = batch["gate"].clone()
    found = cosine(batch["x"], batch["x_prime"], batch["mask"])
    assert math.hypot(found["norm_along"], found["norm_across"]) == pytest.approx(found["norm_x_prime"])
    assert found["norm_along"] == pytest.approx(found["norm_x_prime"] * found["cos_mean_abs"])


@given(st.integers(0, 10_000))
def test_three_readings_are_in_order(seed):
    found = cosine(**draw(seed))
    for name in ("cos", "cos_xy"):
        assert found[f"{name}_abs_of_mean"] == abs(found[f"{name}_signed"])
        assert 0 <= found[f"{name}_abs_of_mean"] <= found[f"{name}_mean_abs"] + 1e-12 <= 1 + 2e-12


def test_by_hand():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]], [[9.0, 9.0], [9.0, 9.0], [3.0, 0.0]]])
    x_prime = torch.tensor([[[9.0, 9.0], [-2.0, 0.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0], [0.0, 5.0]]])
    y = torch.tensor([[[9.0, 9.0], [5.0, 0.0], [-1.0, 0.0]], [[9.0, 9.0], [9.0, 9.0], [0.0, 0.0]]])
    gate = torch.tensor([0.5, -1.0]).expand(2, 3, 2)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    found = cosine(x, x_prime, mask, y=y, gate=gate)
    # cosines -1, 0.8, 0; x' splits into 2 + 0, 4 + 3, 0 + 5; gated into 1 + 0, 4 + 1.5, 0 + 5
    expected = {
        "cos_signed": -0.2 / 3,
        "cos_abs_of_mean": 0.2 / 3,
        "cos_mean_abs": 1.8 / 3,
        "norm_x": 2.0,
        "norm_x_prime": 4.0,
        "norm_along": 2.0,
        "norm_across": 8 / 3,
        "gated_norm_along": 5 / 3,
        "gated_norm_across": 6.5 / 3,
        "gated_cos_signed": (-1 - 4 / 18.25**0.5) / 3,
        "gated_cos_mean_abs": (1 + 4 / 18.25**0.5) / 3,
        "gated_null_perm_signed": (-1 + 1.5 / 18.25**0.5) / 2,
        "gated_null_perm_mean_abs": (1 + 1.5 / 18.25**0.5) / 2,
        "cos_xy_signed": 0.5,
        "cos_xy_abs_of_mean": 0.5,
        "cos_xy_mean_abs": 0.5,
        # only at the newest position are there two users: cos((0, 2), (0, 5)) = 1 and cos((3, 0), (3, 4)) = 0.6
        "null_perm_signed": 0.8,
        "null_perm_mean_abs": 0.8,
        "null_mean_abs": 2 / math.pi,
        "rows": 3,
        "rows_without_update": 0,
        "rows_without_x": 0,
    }
    assert found == pytest.approx(expected)
    # the same batch with the pads at the other end
    left = torch.tensor([[True, True, False], [True, False, False]])
    moved = {name: torch.zeros(2, 3, 2) for name in ("x", "x_prime", "y", "gate")}
    for name, values in (("x", x), ("x_prime", x_prime), ("y", y), ("gate", gate)):
        moved[name][left] = values[mask]
    assert cosine(mask=left, **moved) == pytest.approx(expected)


def test_rows_without_a_direction_are_counted_not_measured():
    batch = draw(1)
    batch["x"][2, -1] = 0
    found = cosine(**batch)
    assert (found["rows_without_update"], found["rows_without_x"]) == (1, 1)
    assert found["rows"] == int(batch["mask"].sum()) - 2
    batch["mask"][0, -1] = batch["mask"][2, -1] = False
    # without these rows ages shift, which only the permutation notices
    again = cosine(**batch)
    for name in ("cos_signed", "norm_x", "norm_across", "gated_norm_along"):
        assert again[name] == pytest.approx(found[name])


def test_a_gate_that_lets_nothing_through_has_no_cosine():
    batch = draw(1)
    shut = torch.zeros_like(batch["gate"])
    found = cosine(**{**batch, "gate": shut})
    assert math.isnan(found["gated_cos_mean_abs"]) and math.isnan(found["gated_null_perm_mean_abs"])
    shut[1, -1] = batch["gate"][1, -1]  # but for one row
    found = cosine(**{**batch, "gate": shut})
    added, x = (batch["gate"] * batch["x_prime"])[1, -1].double(), batch["x"][1, -1].double()
    assert found["gated_cos_signed"] == pytest.approx(float(added @ x / (added.norm() * x.norm())))
    assert found["gated_norm_along"] > 0 and math.isfinite(found["gated_null_perm_mean_abs"])


def test_no_update_anywhere_is_nan_with_its_count():
    x = torch.ones(2, 3, 4)
    found = alignment.cosine(x, torch.zeros_like(x), torch.ones(2, 3, dtype=torch.bool))
    assert (found["rows"], found["rows_without_update"]) == (0, 6)
    assert math.isnan(found["cos_mean_abs"])
    assert math.isnan(found["norm_across"])


def test_a_lone_user_has_no_permutation():
    batch = draw(5, batch=1)
    batch["x_prime"][0, -1] = 1.0
    found = cosine(**batch)
    assert math.isnan(found["null_perm_mean_abs"])
    assert math.isfinite(found["cos_mean_abs"])


def test_permutation_shows_a_direction_that_all_updates_share():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 64, generator=rng) + 1.0
    x_prime = torch.randn(200, 1, 64, generator=rng) + 1.0
    mask = torch.ones(200, 1, dtype=torch.bool)
    found = cosine(x, x_prime, mask)
    assert found["cos_mean_abs"] == pytest.approx(found["null_perm_mean_abs"], abs=0.02)
    assert found["null_perm_mean_abs"] > 4 * found["null_mean_abs"]
    # and none where there is none
    found = cosine(x - 1.0, x_prime, mask)
    assert found["null_perm_mean_abs"] == pytest.approx(found["null_mean_abs"], rel=0.15)


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 256])
def test_analytic_null_is_what_random_directions_show(dim):
    rng = torch.Generator().manual_seed(dim)
    first, second = (torch.randn(40_000, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    drawn = torch.cosine_similarity(first, second).abs()
    assert null_mean_abs(dim) == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 200 + 1e-12)


def test_analytic_null_by_hand():
    assert null_mean_abs(1) == pytest.approx(1)
    assert null_mean_abs(2) == pytest.approx(2 / math.pi)
    assert null_mean_abs(3) == pytest.approx(1 / 2)
    assert null_mean_abs(4096) == pytest.approx(math.sqrt(2 / (math.pi * 4096)), rel=1e-4)


def test_meter_averages_over_rows_not_over_batches():
    batches = [draw(seed, batch=4) for seed in (0, 1)]
    meter = AlignmentMeter()
    for batch in batches:
        meter.update(**batch)
    single = [cosine(**batch) for batch in batches]
    found = meter.result()
    assert found["rows"] == sum(one["rows"] for one in single)
    for name in ("cos_signed", "cos_mean_abs", "norm_across", "gated_norm_along"):
        assert found[name] == pytest.approx(sum(one[name] * one["rows"] for one in single) / found["rows"])
    assert found["cos_abs_of_mean"] == abs(found["cos_signed"])


def test_blocks_change_nothing(monkeypatch):
    whole = cosine(**draw(7))
    monkeypatch.setattr(alignment, "BLOCK", 12)
    assert cosine(**draw(7)) == pytest.approx(whole)


def test_a_batch_without_real_positions_adds_nothing():
    batch = draw(2)
    meter = AlignmentMeter()
    meter.update(**{**batch, "mask": torch.zeros_like(batch["mask"])})
    with pytest.raises(ValueError, match="no real position"):
        meter.result()
    meter.update(**batch)
    assert meter.result() == pytest.approx(cosine(**batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_measured_in_double(dtype):
    batch = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in draw(4).items()}
    exact = {k: v if v.dtype == torch.bool else v.double() for k, v in batch.items()}
    assert cosine(**batch) == cosine(**exact)


def test_squares_of_extreme_float32_neither_vanish_nor_overflow():
    x = torch.tensor([[[1e-30, 1e-30]]])
    x_prime = torch.tensor([[[3e30, 0.0]]])
    found = cosine(x, x_prime, torch.tensor([[True]]))
    assert found["cos_signed"] == pytest.approx(math.sqrt(0.5))
    assert found["rows"] == 1


def test_measuring_leaves_no_graph_and_no_trace():
    batch = draw(6)
    x = batch["x"].clone().requires_grad_()
    before = {name: values.clone() for name, values in batch.items()}
    cosine(**{**batch, "x": x})
    assert x.grad is None
    for name, values in batch.items():
        assert torch.equal(values.nan_to_num(7), before[name].nan_to_num(7))


def test_refusals():
    batch = draw(0)
    x, x_prime, mask = batch["x"], batch["x_prime"], batch["mask"]
    with pytest.raises(ValueError, match="one shape"):
        alignment.cosine(x, x_prime[:, :-1], mask)
    with pytest.raises(ValueError, match="y"):
        alignment.cosine(x, x_prime, mask, y=batch["y"][..., :-1])
    with pytest.raises(ValueError, match="must be torch.bool"):
        alignment.cosine(x, x_prime, mask.long())
    with pytest.raises(ValueError, match="no real position"):
        alignment.cosine(x, x_prime, torch.zeros_like(mask))
    broken = x_prime.clone()
    broken[1, -1, 0] = math.inf
    with pytest.raises(ValueError, match=r"x_prime is not finite at \(user, position\) \(1, 4\)"):
        alignment.cosine(x, broken, mask)
    meter = AlignmentMeter()
    meter.update(**batch)
    with pytest.raises(ValueError, match="earlier batches were 6"):
        meter.update(**draw(0, dim=3))


def test_docstring_examples():
    result = doctest.testmod(alignment)
    assert result.attempted >= 4
    assert result.failed == 0
