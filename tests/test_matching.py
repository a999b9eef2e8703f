"""Building models, counting their parameters and operations, and the parameter-matched baseline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, batches_of_users, events_per_domain
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.models import matching
from gcalib.models.matching import build_model, flops_per_step, matched, parameter_counts, sizes

PAIR = synthetic_pair(num_users=200, num_items=(60, 70), seed=1)
TEXT = {"llm4cdsr": {"text": "random"}}


def config(model: str = "abxi", **changes: object) -> RunConfig:
    return RunConfig(pair="synthetic", model=model, **{"dim": 32, "gca": (0,), **TEXT.get(model, {}), **changes})


# ------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("model", ["sasrec", "sasrec-mixed", "popularity"])
def test_an_insertion_point_that_a_model_lacks_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=f"{model} has no insertion point 0: it has none"):
        build_model(config(model), PAIR)


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "sasrec-mixed"])
def test_models_of_the_mixed_stream_refuse_a_pair_without_a_global_order(model: str) -> None:
    order = np.lexsort((PAIR.domain_of(PAIR.items), PAIR.owner))
    pair = replace(PAIR, items=PAIR.items[order], has_global_order=False)
    with pytest.raises(ValueError, match=model):
        build_model(config(model, gca=()), pair)


# ------------------------------------------------------------------------------------------------------- counting


def test_parameters_are_counted_by_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(7, 3), nn.Linear(3, 2)
            self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    assert parameter_counts(Two()) == {
        "params_total": 21 + 8 + 5, "params_trainable": 29, "params_embedding": 21, "params_network": 8,
    }  # fmt: skip


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "cdsrnp"])
def test_sizes_are_those_of_the_built_model_and_draw_nothing(model: str) -> None:
    state = torch.get_rng_state()
    found = sizes(config(model), PAIR)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == parameter_counts(build_model(config(model), PAIR))


FOOD_KITCHEN = replace(PAIR, num_items=(11_837, 16_258))
# of ABXI in millions, as the paper gives them (Figure 3): points and modules in succession at each
PAPER_SIZES = {
    ((0,), 1): 11.77, ((0,), 2): 13.87, ((0, 1), 1): 13.87, ((0,), 3): 15.97, ((0, 1, 2), 1): 15.97,
}  # fmt: skip


def test_abxi_on_food_kitchen_is_as_large_as_the_official_program() -> None:
    assert sizes(config(gca=(), dim=256), FOOD_KITCHEN)["params_total"] == 9_651_200


@pytest.mark.parametrize(("gca", "depth"), PAPER_SIZES)
def test_abxi_on_food_kitchen_is_as_large_as_in_the_paper(gca: tuple[int, ...], depth: int) -> None:
    size = PAPER_SIZES[gca, depth] * 1e6
    asked = config(gca=gca, gca_depth=depth, dim=256)
    found = sizes(asked, FOOD_KITCHEN)["params_total"]
    assert found == pytest.approx(size, rel=0.005)
    baseline = sizes(asked.replace(match="params"), FOOD_KITCHEN)["params_total"]
    assert baseline == pytest.approx(size, rel=0.01)
    assert baseline == pytest.approx(found, rel=0.01)


def test_the_size_to_match_is_that_of_depth_gate_and_norm() -> None:
    """A module has 16 d^2 weights, 9 d biases and a norm of 2 d; there are two a point."""
    d, plain = 32, sizes(config(gca=()), PAIR)["params_total"]
    module = 16 * d**2 + 9 * d + 2 * d
    changes: dict[str, dict[str, object]] = {"gca_depth": {"gca_depth": 2}, "gca_norm": {"gca_norm": False}}
    changes["gate_hidden"] = {"gate_hidden": 64}
    wanted = {"gca_depth": 4 * module, "gca_norm": 2 * (module - 2 * d), "gate_hidden": 2 * (module - 64 * (3 * d + 1))}
    for name, change in changes.items():
        target = matched(config(match="params", **change), PAIR).target
        assert target - plain == wanted[name], name


# ------------------------------------------------------------------------------------- the parameter-matched baseline


@pytest.mark.parametrize(
    ("model", "gca"),
    [("abxi", (0,)), ("abxi", (0, 1, 2)), ("llm4cdsr", (0,)), ("llm4cdsr", (1, 2)), ("cdsrnp", (0,)), ("cdsrnp", (2,))],
)
@pytest.mark.parametrize(("match", "size"), [("params", "params_total"), ("network", "params_network")])
def test_the_baseline_is_as_large_within_a_percent(model: str, gca: tuple[int, ...], match: str, size: str) -> None:
    asked = config(model, gca=gca, match=match)
    target = parameter_counts(build_model(asked.replace(match=None), PAIR))[size]
    baseline = build_model(asked, PAIR)
    assert parameter_counts(baseline)[size] == pytest.approx(target, rel=0.01)
    assert not [name for name, _ in baseline.named_parameters() if "gca" in name]


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "cdsrnp"])
def test_the_baseline_differs_in_its_widths_only(model: str) -> None:
    asked = config(model, match="params")
    found = matched(asked, PAIR)
    differing = {name for name, value in found.config if value != getattr(asked, name)}
    assert {"gca", "match"} < differing <= {"gca", "match", "dim", "hidden"}
    assert found.config.dim > asked.dim


def test_the_search_says_what_it_found_and_draws_nothing() -> None:
    asked, state = config(match="network"), torch.get_rng_state()
    found = matched(asked, PAIR)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.size == sizes(found.config, PAIR)["params_network"]
    assert found.target == sizes(asked.replace(match=None), PAIR)["params_network"]
    assert found.facts() == {
        "match_size": found.size, "match_target": found.target,
        "match_dim": found.config.dim, "match_hidden": found.config.hidden or 0,
    }  # fmt: skip


def test_a_model_without_insertion_points_cannot_be_matched() -> None:
    with pytest.raises(ValueError, match="sasrec cannot be matched: it takes no .*; abxi, cdsrnp, llm4cdsr do"):
        matched(config("sasrec", match="params"), PAIR)


def test_a_size_that_no_width_comes_near_is_refused() -> None:
    """Steps of a width of 2 are larger than a percent."""
    with pytest.raises(ValueError, match=r"abxi cannot be matched: the nearest size is .* of gca=\(0,\)"):
        matched(config(dim=2, heads=1, domain_rank=1, invariant_rank=1, gate_hidden=2, match="network"), PAIR)


# ------------------------------------------------------------------------------------------------------ operations


def test_flops_are_those_of_the_products() -> None:
    """Three inner widths at equal steps: the feed-forward layers' products grow by equal steps, and nothing else."""
    small, middle, large = (flops_per_step(build_model(config(hidden=h), PAIR), PAIR, 16) for h in (32, 64, 96))
    assert large - middle == middle - small > 0


def test_flops_are_counted_on_the_batch_of_median_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with pads; one of the batches of users of like length that an epoch has."""
    built, training = build_model(config("sasrec", dim=8, gca=()), PAIR), PAIR.split("val")
    asked: list[np.ndarray] = []
    collate = built.collate

    def collated(histories: list[np.ndarray], pair: Pair, *, training: bool, users: np.ndarray) -> Batch:
        asked.append(users)
        return collate(histories, pair, training=training, users=users)

    monkeypatch.setattr(built, "collate", collated)
    flops_per_step(built, PAIR, 16)
    (users,) = asked

    def rows(batch: np.ndarray) -> int:
        return len(batch) * max(len(training.history(user)) for user in batch)

    epoch = list(batches_of_users(events_per_domain(PAIR, training), 16, np.random.default_rng(5)))
    sizes = sorted(rows(batch) for batch in epoch)
    assert len(epoch) == 13
    assert sizes[5] <= rows(users) <= sizes[7]
    assert sizes[0] < sizes[5] and sizes[7] < sizes[-1]
    lengths = [len(training.history(user)) for user in users]
    assert max(lengths) - min(lengths) < np.ptp(training.lengths) / 3


def test_flops_of_attention_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of 2 B L L d operations forward and five backward, in two layers a domain."""
    pair = synthetic_pair(num_users=20, num_items=(60, 70))
    built, training = build_model(config("sasrec", dim=8, gca=()), pair), pair.split("val")
    batch = built.collate([training.history(user) for user in range(20)], pair, training=True)
    expected = sum(2 * 7 * 2 * 20 * stream.items.size(1) ** 2 * 8 for stream in batch.domains)
    counted = flops_per_step(built, pair, 20)
    monkeypatch.setattr(matching, "CPU_ATTENTION_FLOPS", {})
    assert counted - flops_per_step(built, pair, 20) == expected


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "cdsrnp", "sasrec", "sasrec-mixed"])
def test_flops_do_not_depend_on_what_was_drawn_before(model: str) -> None:
    """A step of CDSRNP reads some of its support users only, LLM4CDSR's contrasts drawn items."""
    built, counts = build_model(config(model, dim=8, gca=()), PAIR), set()
    for seed in range(3):
        torch.manual_seed(seed)
        counts.add(flops_per_step(built, PAIR, 16))
    assert len(counts) == 1


def test_counting_flops_leaves_the_model_as_it_was() -> None:
    built = build_model(config(dim=8), PAIR).eval()
    flops_per_step(built, PAIR, 16)
    assert not built.training
    assert all(parameter.grad is None for parameter in built.parameters())


@pytest.mark.parametrize("model", ["abxi", "llm4cdsr", "cdsrnp", "sasrec", "sasrec-mixed"])
def test_flops_are_counted_on_the_device_that_holds_the_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run on a GPU, for which torch's device without memory stands here."""
    built = build_model(config(model, dim=8, gca=()), PAIR).to("meta")
    seen = set()

    def loss(batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        seen.update(tensor.device.type for tensor in (negatives, batch.mixed.items, batch.a.items, batch.b.items))
        weight = next(parameter for parameter in built.parameters() if parameter.requires_grad)
        return {"a": weight.flatten()[:4].view(2, 2).mm(torch.ones(2, 2, device="meta")).sum()}

    monkeypatch.setattr(built, "loss", loss)
    assert flops_per_step(built, PAIR, 16) > 0
    assert seen == {"meta"}
