"""The built-in pair: what is planted can be found in it, and `novelty` does what it says."""

from __future__ import annotations

import numpy as np
import pytest

from gcalib.data.sources import load_pair
from gcalib.data.synthetic import DAY, generate, synthetic_pair

USERS = 2000
SIZES = (550, 600)


@pytest.fixture(scope="module")
def planted() -> dict[float, tuple]:
    return {novelty: generate(USERS, SIZES, novelty, seed=7) for novelty in (0.0, 0.3, 0.65, 1.0)}


def summaries(world: tuple, target_domain: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place of each user's last event in a domain, and decaying averages of the places before it, by domain."""
    events, places, _, _ = world
    user, item = events.table["user"].to_numpy(), events.table["item"].to_numpy()
    in_b, event = item > SIZES[0], np.arange(len(item))
    last = np.full(USERS, -1)
    np.maximum.at(last, user[in_b == bool(target_domain)], event[in_b == bool(target_domain)])
    age = last[user] - event
    features = []
    for domain in (target_domain, 1 - target_domain):
        for rate in (0.5, 0.8, 0.95):
            weight = np.where((in_b == bool(domain)) & (age > 0), rate ** np.maximum(age, 0), 0.0)
            sums = [np.bincount(user, weight * places[item - 1, axis], minlength=USERS) for axis in (0, 1)]
            features.append(np.stack(sums, axis=1) / np.maximum(np.bincount(user, weight), 1e-9)[:, None])
    return places[item[last] - 1], np.hstack(features[:3]), np.hstack(features[3:])


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


def test_groups_are_told_by_any_event(planted):
    for events, _, item_groups, user_groups in planted.values():
        assert (item_groups[events.table["item"] - 1] == user_groups[events.table["user"]]).all()


def test_items_are_followed_by_items_near_them(planted):
    events, places, _, _ = planted[0.0]
    user, item = events.table["user"].to_numpy(), events.table["item"].to_numpy()
    near = (np.diff(user) == 0) & (np.diff(item > SIZES[0]) == 0)
    here, there = places[item[:-1][near] - 1], places[item[1:][near] - 1]
    at_random = np.random.default_rng(0).permutation(here)
    assert np.linalg.norm(there - here, axis=1).mean() < 0.6 * np.linalg.norm(there - at_random, axis=1).mean()


def test_popularity_is_skewed(planted):
    counts = planted[0.65][0].table["item"].value_counts()
    assert counts[: sum(SIZES) // 10].sum() > 0.2 * counts.sum()


@pytest.fixture(scope="module")
def published():
    return load_pair("synthetic", ties="published")


def test_lengths_follow_food_kitchen(published):
    """Food-Kitchen: quartiles 14, 20, 31; mean 24.3."""
    per_domain = np.bincount(published.owner * 2 + published.domain_of(published.items))
    assert per_domain.min() == 5
    assert published.lengths.max() == 50
    assert np.abs(np.percentile(published.lengths, (25, 50, 75)) - (14, 20, 31)).max() <= 3
    assert 22 < published.lengths.mean() < 26


def test_times_and_switches_follow_food_kitchen(published):
    """Food-Kitchen: 31% of neighbours on one day, ids ascending within it; switches 36%."""
    same_user = np.diff(published.owner) == 0
    gaps = np.diff(published.times)[same_user]
    assert (published.times % DAY == 0).all()
    assert gaps.min() == 0
    assert 0.27 < (gaps == 0).mean() < 0.35
    assert (np.diff(published.items)[same_user][gaps == 0] > 0).all()
    assert 0.30 < (np.diff(published.domain_of(published.items)) != 0)[same_user].mean() < 0.42


def test_hash_is_what_records_name(published):
    assert published.sha256[:16] == "12d62506cec2ca76"
    assert load_pair("synthetic").sha256[:16] == "2b5181e81aa22ec8"
    assert load_pair("synthetic:novelty=1.0,seed=3").sha256[:16] == "dfa9134008b5db11"


def test_no_item_is_bought_twice():
    pair = synthetic_pair(num_users=300, num_items=(60, 50), seed=2)
    assert pair.counts["repeated_events"] == 0
    assert pair.items[pair.domain_of(pair.items) == 0].max() <= 60 < pair.items.max() <= 110


def test_seed_decides_the_pair():
    assert synthetic_pair(200, seed=1).sha256 == synthetic_pair(200, seed=1).sha256
    assert synthetic_pair(200, seed=1).sha256 != synthetic_pair(200, seed=2).sha256


def test_titles_name_the_planted_factors():
    pair, (_, places, groups, _) = synthetic_pair(50, (60, 400), seed=3), generate(50, (60, 400), 0.5, 3)
    words = np.array([pair.titles.by_name[name].split() for name in pair.item_names])
    for column, factor in ((1, places[:, 0]), (2, places[:, 1])):
        assert max(factor[words[:, column] == word].std() for word in set(words[:, column])) < 0.7 * factor.std()
    assert len(set(words[:, 3])) == len(set(groups))


def test_name_holds_options():
    pair = load_pair("synthetic:novelty=1.0,seed=3,num_users=150,items_a=400")
    assert pair.sha256 == synthetic_pair(150, (400, 1200), novelty=1.0, seed=3).sha256
    assert pair.name == "synthetic:novelty=1.0,seed=3,num_users=150,items_a=400"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:noveltly=1", "cannot use 'noveltly'; the options are num_users, items_a"),
        ("synthetic:seed=1,novelty=high", "novelty=high': cannot use could not convert string to float: 'high'"),
        ("synthetic:", "'synthetic:': cannot use not enough values"),
        ("synthetic:novelty=1.5", "novelty=1.5, seed=0: a synthetic pair needs .* novelty from 0 to 1"),
        ("synthetic:novelty=nan", "novelty=nan, seed=0: a synthetic pair needs"),
        ("synthetic:num_users=0", "num_users=0"),
        ("synthetic:items_b=20", "50 items in each domain"),
    ],
)
def test_name_with_bad_options(name, message):
    with pytest.raises(ValueError, match=message):
        load_pair(name)
