"""The built-in pair: what is planted can be found in it, and `novelty` does what it says."""

from __future__ import annotations

import numpy as np
import pytest

from gcalib.data import load_pair, statistics, synthetic_pair
from gcalib.data.prepare import Options
from gcalib.data.synthetic import DAY, Planted, generate

USERS = 3000


@pytest.fixture(scope="module")
def planted() -> dict[float, Planted]:
    return {novelty: generate(USERS, (1100, 1200), novelty, seed=7) for novelty in (0.0, 0.3, 0.65, 1.0)}


def summaries(world: Planted, target_domain: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place of each user's last event in a domain, and decaying averages of the places before it, by domain."""
    events, in_b = world.events, world.events.items > world.num_items[0]
    starts = np.searchsorted(events.owner, np.arange(USERS + 1))
    targets, own, other = [], [], []
    for user in range(USERS):
        rows = np.arange(starts[user], starts[user + 1])
        last = rows[in_b[rows] == bool(target_domain)][-1]
        before = rows[rows < last]
        features = []
        for domain in (target_domain, 1 - target_domain):
            here = before[in_b[before] == bool(domain)]
            places = world.item_factors[events.items[here] - 1]
            age = (last - here)[:, None]
            weights = [rate**age for rate in (0.5, 0.8, 0.95)]
            features.append(np.concatenate([(w * places).sum(axis=0) / max(w.sum(), 1e-9) for w in weights]))
        targets.append(world.item_factors[events.items[last] - 1])
        own.append(features[0])
        other.append(features[1])
    return np.array(targets), np.array(own), np.array(other)


def explained(targets: np.ndarray, features: np.ndarray) -> float:
    """Share of the variance of held-out targets that a least-squares fit explains."""
    design = np.column_stack([np.ones(len(features)), features])
    half = len(design) // 2
    weights = np.linalg.lstsq(design[:half], targets[:half], rcond=None)[0]
    rest = targets[half:] - design[half:] @ weights
    return float(1 - (rest**2).sum() / ((targets[half:] - targets[half:].mean(axis=0)) ** 2).sum())


def test_novelty_is_what_the_other_domain_adds(planted):
    """How much better the next item of a domain is predicted with the other domain's history than without it."""
    gains = []
    for world in planted.values():
        both = [summaries(world, target_domain) for target_domain in (0, 1)]
        # Users of one half in both domains: the fit and its test share no user.
        targets, own, other = (np.stack(parts, axis=1).reshape(2 * USERS, -1) for parts in zip(*both, strict=True))
        alone = explained(targets, own)
        assert alone > 0.3  # the domain's own history is worth something at any novelty
        gains.append(explained(targets, np.column_stack([own, other])) - alone)
    assert abs(gains[0]) < 0.005
    assert (np.diff(gains) > 0.005).all(), gains
    assert gains[-1] > 0.04


def test_the_shared_factor_is_told_by_any_event_of_either_domain(planted):
    for world in planted.values():
        groups = world.item_groups[world.events.items - 1]
        assert (groups == world.user_groups[world.events.owner]).all()
        assert np.bincount(world.user_groups).min() > 0.5 * USERS / 8


def test_an_item_tends_to_be_followed_by_items_near_it(planted):
    world = planted[0.0]
    events, in_b = world.events, world.events.items > world.num_items[0]
    places = world.item_factors[events.items - 1]
    near = (np.diff(events.owner) == 0) & (np.diff(in_b) == 0)
    step = np.linalg.norm(np.diff(places, axis=0), axis=1)[near].mean()
    shuffled = np.random.default_rng(0).permutation(places[:-1][near])
    assert step < 0.6 * np.linalg.norm(shuffled - places[1:][near], axis=1).mean()


def test_popularity_is_skewed(planted):
    counts = np.sort(np.bincount(planted[0.65].events.items, minlength=2301)[1:])[::-1]
    assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum()


def test_lengths_switches_and_ties_follow_the_real_pairs():
    pair = load_pair("synthetic")
    figures = statistics(pair)
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    per_domain = np.bincount(owner * 2 + pair.domain_of(pair.items))
    assert per_domain.min() == 5 and pair.lengths.max() == 50
    # Food-Kitchen: quartiles 14, 20, 31; mean 24.3; ties 31% of neighbours, 32% of last events; switches 36%.
    assert np.abs(np.percentile(pair.lengths, (25, 50, 75)) - (14, 20, 31)).max() <= 3
    assert 22 < pair.lengths.mean() < 26
    assert 0.27 < figures["tie_share"] < 0.35 and 0.27 < figures["last_tied_share"] < 0.36
    published = load_pair("synthetic", ties="published")
    same_user = np.diff(owner) == 0
    switches = np.diff(published.domain_of(published.items).astype(int)) != 0
    assert 0.30 < switches[same_user].mean() < 0.42
    tied = same_user & (np.diff(published.times) == 0)
    assert (np.diff(published.items)[tied] > 0).all()
    assert (pair.times % DAY == 0).all() and pair.times.min() > 0
    assert (np.diff(pair.times)[same_user] >= 0).all()


def test_no_item_is_bought_twice_and_none_stands_in_both_domains():
    pair = synthetic_pair(num_users=300, num_items=(60, 50), seed=2)
    for user in range(pair.num_users):
        assert len(np.unique(pair.sequence(user))) == pair.lengths[user]
    assert pair.items[pair.domain_of(pair.items) == 0].max() <= 60 < pair.items.max() <= 110
    assert pair.counts["repeated_events"] == 0


def test_seeds():
    assert synthetic_pair(200, seed=1).sha256 == synthetic_pair(200, seed=1).sha256
    assert synthetic_pair(200, seed=1).sha256 != synthetic_pair(200, seed=2).sha256
    ties = [synthetic_pair(200, options=Options(tie_seed=seed)) for seed in (0, 1)]
    assert (ties[0].times == ties[1].times).all() and (ties[0].items != ties[1].items).any()


def test_options_in_the_name():
    pair = load_pair("synthetic:novelty=1.0,seed=3,num_users=150,items_a=400")
    same = synthetic_pair(150, (400, 1200), novelty=1.0, seed=3)
    assert pair.sha256 == same.sha256 != load_pair("synthetic:num_users=150,items_a=400").sha256
    assert pair.name == "synthetic:novelty=1.0,seed=3,num_users=150,items_a=400"
    assert pair.num_items == (400, 1200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:noveltly=1", "cannot use 'noveltly=1'; the options are num_users, items_a"),
        ("synthetic:novelty=high", "cannot use 'novelty=high'"),
        ("synthetic:seed=1,seed=2", "cannot use 'seed=2'.*each once"),
        ("synthetic:", "cannot use ''"),
        ("synthetic:novelty=1.5", "novelty=1.5 must lie between 0"),
        ("synthetic:novelty=nan", "novelty=nan must lie between 0"),
        ("synthetic:num_users=0", "num_users=0.*a user or more"),
        ("synthetic:items_b=20", "50 items or more in each domain"),
    ],
)
def test_bad_options_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_pair(name)
