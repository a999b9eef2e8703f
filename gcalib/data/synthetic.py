"""The built-in pair: a generator of two-domain histories whose structure is planted, and therefore known.

What is planted, for user u and the events t = 1, 2, ... of the user's mixed stream:

-   A *shared factor*: users and items belong to a few groups; a user buys inside one group only, in both domains. One
    event of either domain reveals it, so it carries nothing new from one to the other.
-   A *private factor* of each domain: an interest in R^2 that drifts from event to event,

        z_A[t] = r z_A[t-1] + sqrt(1 - r^2) e_A[t],     e_A = sqrt(s) c + sqrt(1 - s) a
        z_B[t] = r z_B[t-1] + sqrt(1 - r^2) e_B[t],     e_B = sqrt(s) c + sqrt(1 - s) b

    with a, b, c independent standard normal, z stationary and s = sqrt(novelty) its correlation across domains:
    `novelty` is the share of the variance of one interest that the other explains. At 0 the events of B tell nothing
    about the next event of A that A's own events do not; at 1 both domains follow one interest.
-   The choice: item i of the group and domain, not bought before, with probability proportional to
    popularity_i exp(-|z - f_i|^2 / (2 w^2)). Because z drifts slowly, an item tends to be followed by items near it.
-   Popularity is skewed (Zipf); lengths, domain switches, gaps and ties of days follow Food-Kitchen: 5 events or more
    in each domain, 50 in all, 31% of neighbours on one day, where the published order is by ascending id.
-   Titles name an item's group and, in eighths, its place f, between two words that tell nothing.
"""

from __future__ import annotations

from itertools import zip_longest
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from gcalib.data.pair import Pair, Titles
from gcalib.data.prepare import Events, Options, finish

GROUPS = ("garden", "kitchen", "office", "travel", "music", "sports", "nursery", "workshop")
# Eighths of the plane of items along its two axes, from one end to the other.
COLOURS = ("violet", "blue", "teal", "green", "yellow", "orange", "red", "brown")
MATERIALS = ("paper", "cotton", "leather", "wooden", "plastic", "glass", "copper", "steel")
NOISE = (
    "classic", "deluxe", "new", "premium", "portable", "double", "small", "large", "original", "simple", "folding",
    "vintage", "modern", "round", "light", "heavy", "quick", "gift", "value", "set", "pack", "refill", "kit", "pair",
)  # fmt: skip
LEAST_ITEMS = 50  # of a domain and group: a user may need 45 different ones
PERSISTENCE = 0.9  # r: an interest halves its correlation in about 7 events
WIDTH = 0.4  # w: how closely a choice follows the interest, in units of the interest's standard deviation
SKEW = 1.0  # exponent of the popularity of the k-th most popular item of a group, k^-SKEW

# Measured on Food-Kitchen: events beyond the minimum and gaps between days are close to log-normal.
LEAST_EVENTS, MOST_EVENTS = 5, 50
EXTRA_LOG_MEAN, EXTRA_LOG_SD, EXTRA_CORRELATION = 1.6, 1.1, 0.2
TIE_PROBABILITY = 0.31
GAP_LOG_MEAN, GAP_LOG_SD, GAP_MOST = 3.45, 1.54, 240  # days
STAY_ODDS = 1.8  # odds of staying in a domain against switching, which gives 36% of switches
DAY = 86_400
LAST_DAY = 16_274  # 2014-07-23, the end of the Amazon release


def synthetic_pair(
    num_users: int = 2000,
    num_items: tuple[int, int] = (1100, 1200),
    novelty: float = 0.5,
    seed: int = 0,
    *,
    name: str = "synthetic",
    options: Options | None = None,
) -> Pair:
    """Generate the built-in pair.

    Parameters
    ----------
    num_users, num_items
        Users, 1 or more; items of A and of B, 50 or more each (the default leaves room for 999 sampled candidates).
    novelty
        From 0 (domain B tells nothing new about A, nor A about B) to 1 (both follow one interest).
    seed
        Of the generator.
    name, options
        Of the pair; ties, maximum length and so on, as in `load_pair`.
    """
    events, places, groups, _ = generate(num_users, num_items, novelty, seed)
    titles = Titles(dict(zip(events.item_names, _titles(places, groups, seed), strict=True)), "planted titles")
    return finish(events, name, ("a", "b"), options or Options(), titles)


def parse_name(name: str) -> dict[str, Any]:
    """Arguments of `synthetic_pair` in a name.

    >>> parse_name("synthetic:novelty=1.0,items_a=300")
    {'num_items': (300, 1200), 'novelty': 1.0}
    """
    kinds = {"num_users": int, "items_a": int, "items_b": int, "novelty": float, "seed": int}
    parts = [part.split("=") for part in name.partition(":")[2].split(",") if ":" in name]
    try:
        found: dict[str, Any] = {key.strip(): kinds[key.strip()](value) for key, value in parts}
    except (KeyError, ValueError) as error:
        form = f"{', '.join(kinds)}, as in synthetic:novelty=1.0,seed=3"
        raise ValueError(f"{name!r}: cannot use {error}; the options are {form}.") from None
    return {"num_items": (found.pop("items_a", 1100), found.pop("items_b", 1200)), **found}


def generate(
    num_users: int, num_items: tuple[int, int], novelty: float, seed: int
) -> tuple[Events, np.ndarray, np.ndarray, np.ndarray]:
    """Events, by time and within a day by item id; (items, 2) places f, (items,) and (users,) groups behind them."""
    if num_users < 1 or min(num_items) < LEAST_ITEMS or not 0.0 <= novelty <= 1.0 or seed < 0:
        needed = f"1 user, {LEAST_ITEMS} items in each domain, novelty from 0 to 1 and a seed of 0 or more"
        raise ValueError(f"{num_users=}, {num_items=}, {novelty=}, {seed=}: a synthetic pair needs {needed}.")
    rng = np.random.default_rng(seed)
    groups = min(len(GROUPS), min(num_items) // LEAST_ITEMS)
    # Ids are given out at random: an id tells neither group nor place nor popularity.
    group = np.concatenate([rng.permutation(np.arange(size) % groups) for size in num_items])
    place = rng.standard_normal((sum(num_items), 2))
    in_b = np.arange(len(group)) >= num_items[0]
    stocks = [[np.flatnonzero((group == g) & (in_b == d)) for g in range(groups)] for d in (False, True)]
    log_popularity = np.zeros(len(group))
    for members in (*stocks[0], *stocks[1]):
        log_popularity[rng.permutation(members)] = -SKEW * np.log(1 + np.arange(len(members)))
    user_group, lengths = rng.integers(0, groups, num_users), _lengths(rng, num_users)
    domains = _domains(rng, lengths)
    chosen, kept = _choose(rng, domains, novelty, user_group, stocks, place, log_popularity), domains >= 0
    days = _days(rng, kept)
    owner = np.repeat(np.arange(num_users), lengths.sum(axis=1))
    table = pd.DataFrame({"user": owner, "item": 1 + chosen[kept], "time": days[kept] * DAY})
    table = table.sort_values(["user", "time", "item"], ignore_index=True)
    names = [f"{domain}{i}" for domain, size in zip("ab", num_items, strict=True) for i in range(1, 1 + size)]
    events = Events(table, np.array(names, dtype=object), num_items, has_global_order=True)
    return events, place, group, user_group


def _lengths(rng: np.random.Generator, users: int) -> np.ndarray:
    """int64 (users, 2): events in A and in B, long-tailed, 5 or more each and 50 or fewer together."""
    normal = rng.standard_normal((users, 3))
    mixed = np.sqrt(EXTRA_CORRELATION) * normal[:, :1] + np.sqrt(1 - EXTRA_CORRELATION) * normal[:, 1:]
    extra = np.floor(np.exp(EXTRA_LOG_MEAN + EXTRA_LOG_SD * mixed) - 1).clip(0, 1000)
    lengths = LEAST_EVENTS + extra.astype(np.int64)
    total = lengths.sum(axis=1)
    share = (MOST_EVENTS * lengths[:, 0] // total).clip(LEAST_EVENTS, MOST_EVENTS - LEAST_EVENTS)
    return np.where(total[:, None] > MOST_EVENTS, np.stack([share, MOST_EVENTS - share], axis=1), lengths)


def _domains(rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
    """int8 (users, 50): the domain of each event, -1 after the last; users tend to stay in one for a while."""
    left = lengths.astype(float)
    domains = np.full((len(lengths), MOST_EVENTS), -1, dtype=np.int8)
    before = np.full(len(lengths), -1)
    for step in range(MOST_EVENTS):
        odds_a = left[:, 0] * np.select([before == 0, before == 1], [STAY_ODDS, 1 / STAY_ODDS], 1.0)
        chance_b = left[:, 1] / np.maximum(odds_a + left[:, 1], 1e-300)
        before = (rng.random(len(lengths)) < chance_b).astype(int)
        active = left.sum(axis=1) > 0
        domains[active, step] = before[active]
        left[active, before[active]] -= 1
    return domains


def _choose(
    rng: np.random.Generator, domains: np.ndarray, novelty: float, user_group: np.ndarray,
    stocks: list[list[np.ndarray]], place: np.ndarray, log_popularity: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """int64 (users, 50): the item of each event, counted from 0; arbitrary after the last."""

    def innovation() -> np.ndarray:
        common, private = (rng.standard_normal((sides, len(domains), 2)) for sides in (1, 2))
        return novelty**0.25 * common + np.sqrt(1 - np.sqrt(novelty)) * private

    interest = innovation()  # (domain, user, dimension)
    # (users, most items of a group): the items of each user's group in each domain, filled up with -1
    offers = [np.array(list(zip_longest(*stock, fillvalue=-1))).T[user_group] for stock in stocks]
    free = [np.where(offer >= 0, 0.0, -np.inf) for offer in offers]
    chosen = np.zeros(domains.shape, dtype=np.int64)
    for step in range(domains.shape[1]):
        interest = PERSISTENCE * interest + np.sqrt(1 - PERSISTENCE**2) * innovation()
        for domain in (0, 1):
            who = np.flatnonzero(domains[:, step] == domain)
            candidates = offers[domain][who]  # (users here, items of their group)
            distance = ((place[candidates] - interest[domain, who, None]) ** 2).sum(axis=2)
            logits = free[domain][who] + log_popularity[candidates] - distance / (2 * WIDTH**2)
            pick = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # a draw from softmax(logits)
            chosen[who, step] = candidates[np.arange(len(who)), pick]
            free[domain][who, pick] = -np.inf
    return chosen


def _days(rng: np.random.Generator, kept: np.ndarray) -> np.ndarray:
    """int64 (users, 50): days since 1970, ascending, the last event near the end of the release."""
    gaps = np.exp(GAP_LOG_MEAN + GAP_LOG_SD * rng.standard_normal(kept.shape)).clip(1, GAP_MOST)
    gaps = np.where(rng.random(kept.shape) < TIE_PROBABILITY, 0, np.ceil(gaps)).astype(np.int64) * kept
    end = LAST_DAY - rng.integers(0, 365, len(kept))
    return end[:, None] - gaps.sum(axis=1, keepdims=True) + np.cumsum(gaps, axis=1)


def _titles(places: np.ndarray, groups: np.ndarray, seed: int) -> list[str]:
    """A title for each item, such as "vintage blue wooden office set"."""
    rng = np.random.default_rng([seed, 2])  # the words that tell nothing have a generator of their own
    edges = [NormalDist().inv_cdf(number / len(COLOURS)) for number in range(1, len(COLOURS))]
    eighths = np.searchsorted(edges, places)
    noise = rng.integers(0, len(NOISE), (len(places), 2))
    return [
        f"{NOISE[before]} {COLOURS[x]} {MATERIALS[y]} {GROUPS[group]} {NOISE[after]}"
        for (x, y), group, (before, after) in zip(eighths, groups, noise, strict=True)
    ]
