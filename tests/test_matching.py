"""Parameter matching: sizes within a percent, along the axis that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.models import build_model, matched
from gcalib.models.cost import flops_per_step, parameter_counts


@pytest.fixture(scope="module")
def pair() -> Pair:
    return synthetic_pair(num_users=40, num_items=(60, 70), seed=1)


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": "synthetic", "dim": 32, "gca": (0,), "match": "params", **changes})


@pytest.mark.parametrize("gca", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("axis", ["width", "hidden", "rank"])
def test_the_twin_is_as_large_and_differs_along_its_axis_only(pair: Pair, axis: str, gca: tuple[int, ...]) -> None:
    asked = config(gca=gca, match_axis=axis)
    match = matched(asked, pair)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    real = parameter_counts(build_model(asked.but(match=None), pair))["params_network"]
    twin = parameter_counts(build_model(asked, pair))["params_network"]
    assert match.target == real and match.size == twin and abs(twin - real) <= 0.01 * real
    torch.set_rng_state(state)
    matched(asked, pair)
    assert torch.equal(torch.get_rng_state(), state)  # the search draws nothing
    differing = {name for name, value in match.config if value != getattr(asked, name)} - {"gca", "match", "match_axis"}
    allowed = {"width": {"dim", "hidden"}, "hidden": {"hidden"}, "rank": {"domain_rank", "invariant_rank"}}[axis]
    assert differing and differing <= allowed and (axis != "width" or "dim" in differing)
    assert not any("gca" in name for name, _ in build_model(asked, pair).named_parameters())


@pytest.mark.parametrize(
    ("model", "axis", "allowed"),
    [
        ("cdsrnp", "width", {"dim", "hidden"}), ("cdsrnp", "hidden", {"hidden"}),
        ("llm4cdsr", "width", {"dim", "hidden"}), ("llm4cdsr", "hidden", {"hidden"}),
        ("llm4cdsr", "adapter", {"adapter"}),
    ],
)  # fmt: skip
def test_the_other_models_have_twins_too(pair: Pair, model: str, axis: str, allowed: set[str]) -> None:
    text = {"text": "hashed-words"} if model == "llm4cdsr" else {}
    asked = config(model=model, match_axis=axis, **text)
    match = matched(asked, pair)
    real = parameter_counts(build_model(asked.but(match=None), pair))["params_network"]
    twin = parameter_counts(build_model(asked, pair))["params_network"]
    assert match.target == real and match.size == twin and abs(twin - real) <= 0.01 * real
    differing = {name for name, value in match.config if value != getattr(asked, name)} - {"gca", "match", "match_axis"}
    assert differing and differing <= allowed


@pytest.mark.parametrize(("model", "seed"), [("abxi", 0), ("cdsrnp", 3), ("llm4cdsr", 3)])
def test_the_twin_by_flops(pair: Pair, model: str, seed: int) -> None:
    """Sizes are counted as records count them, whatever the run's seed."""
    text = {"text": "hashed-words"} if model == "llm4cdsr" else {}
    asked = config(model=model, match="flops", batch_size=16, seed=seed, **text)
    match = matched(asked, pair)
    real = flops_per_step(build_model(asked.but(match=None), pair), pair, 16)
    assert match.target == real
    assert match.size == flops_per_step(build_model(match.config, pair), pair, 16) == pytest.approx(real, rel=0.01)


def test_a_record_names_the_widths_that_its_model_has(pair: Pair) -> None:
    assert matched(config(match_axis="rank"), pair).facts().keys() == {
        "match_size", "match_target", "match_dim", "match_domain_rank", "match_invariant_rank",
    }  # fmt: skip
    asked = config(model="llm4cdsr", match_axis="adapter", text="hashed-words")
    assert matched(asked, pair).facts().keys() == {"match_size", "match_target", "match_dim", "match_adapter"}


def test_counting_by_hand(pair: Pair) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(7, 3), nn.Linear(3, 2)
            self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    assert parameter_counts(Two()) == {
        "params_total": 21 + 8 + 5, "params_trainable": 29, "params_embedding": 21, "params_network": 8,
    }  # fmt: skip


def test_what_cannot_be_matched_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="abxi cannot be matched along layers; its axes are width, hidden, rank"):
        matched(config(match_axis="layers"), pair)
    refused = r"cdsrnp cannot be matched along layers: the nearest size is .* try width or hidden\.$"
    with pytest.raises(ValueError, match=refused):
        matched(config(model="cdsrnp", match_axis="layers"), pair)
    with pytest.raises(ValueError, match="sasrec cannot be matched: it takes no cross-attention"):
        matched(config(model="sasrec"), pair)


def test_flops_are_those_of_the_products(pair: Pair) -> None:
    """Twice the feed-forward's inner width adds its products, three times for forward and backward, no more."""
    small, large = (flops_per_step(build_model(config(gca=(), match=None, hidden=h), pair), pair, 16) for h in (32, 64))
    larger = flops_per_step(build_model(config(gca=(), match=None, hidden=96), pair), pair, 16)
    assert larger - large == large - small > 0


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "cdsrnp", "sasrec", "sasrec-mixed"])
def test_operations_are_counted_on_the_device_that_holds_the_model(
    pair: Pair, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run on a GPU, for which torch's device without memory stands here."""
    gca = () if model.startswith("sasrec") else (0,)
    text = {"text": "hashed-words"} if model == "llm4cdsr" else {}
    asked = RunConfig(pair="synthetic", model=model, dim=8, heads=2, gca=gca, **text)
    built = build_model(asked, pair).to("meta")
    seen = set()

    def loss(batch: Batch, negatives: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.update(t.device.type for t in (negatives, batch.mixed.items, *(s.items for s in batch.own)))
        weight = next(p for p in built.parameters() if p.requires_grad)
        return {"a": weight.flatten()[:4].view(2, 2).mm(torch.ones(2, 2, device="meta")).sum()}

    monkeypatch.setattr(built, "loss", loss)
    assert flops_per_step(built, pair, 16) > 0 and seen == {"meta"}
