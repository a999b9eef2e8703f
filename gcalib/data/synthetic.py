"""The built-in pair: a generator of two-domain histories whose structure is planted, and therefore known.

What is planted, for user u and the events t = 1, 2, ... of the user's mixed stream:

-   A *shared factor*: the user belongs to one of a few groups, and so does every item; a user buys inside the group
    only, in both domains. One event of either domain reveals it, so it carries nothing new from one to the other.
-   A *private factor* of each domain: an interest in R^2 that drifts from event to event,

        z_A[t] = r z_A[t-1] + sqrt(1 - r^2) e_A[t],     e_A = sqrt(s) c + sqrt(1 - s) a
        z_B[t] = r z_B[t-1] + sqrt(1 - r^2) e_B[t],     e_B = sqrt(s) c + sqrt(1 - s) b

    with a, b, c independent standard normal, z stationary and s = sqrt(novelty) its correlation across domains at
    every moment: `novelty` is the share of the variance of one interest that the other explains. At 0 the events of
    B tell nothing about the next event of A that A's own events do not; at 1 both domains follow one interest, and
    the latest event of B is worth as much as the latest of A.
-   The choice: item i of the group and domain, not bought before, with probability proportional to
    popularity_i exp(-|z - f_i|^2 / (2 w^2)). Because z drifts slowly, an item tends to be followed by items near it.
-   Popularity is skewed (Zipf), no item stands in both domains, and lengths, domain switches, gaps and ties of days
    follow Food-Kitchen: 5 events or more in each domain, 50 in all, 31% of neighbours on one day, where the
    published order is by ascending id.
-   Titles name an item's group and, in eighths, its place f (`gcalib.data.naming`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gcalib.data.naming import planted_titles
from gcalib.data.pair import Pair, Titles
from gcalib.data.prepare import Events, Options, finish

DIMENSIONS = 2  # of interests and items: with some 140 items a group, the plane is covered and neighbours exist
GROUPS = 8
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


@dataclass(frozen=True, eq=False)
class Planted:
    """Generated events with the factors they were drawn from.

    Attributes
    ----------
    events
        In published order: by time, within a day by item id.
    num_items
        Items of domain A and of domain B.
    item_factors
        float (nA + nB, 2), the place f of item 1, 2, ...
    item_groups
        int64 (nA + nB,), the group of item 1, 2, ...
    user_groups
        int64 (users,).
    """

    events: Events
    num_items: tuple[int, int]
    item_factors: np.ndarray
    item_groups: np.ndarray
    user_groups: np.ndarray


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
    num_users
        Users, 1 or more.
    num_items
        Items of domain A and of domain B, 50 or more each. The default leaves room for 999 sampled candidates.
    novelty
        From 0 (domain B tells nothing new about A, nor A about B) to 1 (both follow one interest): the squared
        correlation of the two domains' interests.
    seed
        Of the generator; the same seed gives the same pair.
    name
        Of the pair.
    options
        Ties, maximum length and so on, as in `load_pair`.

    Raises
    ------
    ValueError
        For a value out of range.
    """
    planted = generate(num_users, num_items, novelty, seed)
    titles = planted_titles(planted.item_factors, planted.item_groups, seed)
    return finish(
        planted.events,
        name=name,
        domains=("a", "b"),
        num_items=planted.num_items,
        has_clock=True,
        options=options or Options(),
        raw=False,
        titles=Titles(dict(zip(planted.events.item_names, titles, strict=True)), "planted titles"),
    )


def parse_name(name: str) -> dict[str, Any]:
    """Read the options in a name such as "synthetic:novelty=1.0,seed=3".

    >>> parse_name("synthetic:novelty=1.0,items_a=300")
    {'name': 'synthetic:novelty=1.0,items_a=300', 'novelty': 1.0, 'num_items': (300, 1200)}

    Raises
    ------
    ValueError
        For an unknown option, or a value that is not a number; the message lists the options.
    """
    kinds = {"num_users": int, "items_a": int, "items_b": int, "novelty": float, "seed": int}
    found: dict[str, Any] = {}
    for part in name.partition(":")[2].split(",") if ":" in name else []:
        key, _, value = part.strip().partition("=")
        try:
            if key in found:
                raise ValueError
            found[key] = kinds[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{name}: cannot use {part.strip()!r}; the options are {', '.join(kinds)}, each once, as in "
                "synthetic:novelty=1.0,seed=3."
            ) from None
    if "items_a" in found or "items_b" in found:
        found["num_items"] = found.pop("items_a", 1100), found.pop("items_b", 1200)
    return {"name": name, **found}


def generate(num_users: int, num_items: tuple[int, int], novelty: float, seed: int) -> Planted:
    """Generate events and the factors behind them; the parameters are those of `synthetic_pair`."""
    if not 0.0 <= novelty <= 1.0:
        raise ValueError(f"novelty={novelty} must lie between 0 (domain B tells nothing new about A) and 1.")
    if num_users < 1 or min(num_items) < LEAST_ITEMS or seed < 0:
        raise ValueError(
            f"num_users={num_users}, num_items={tuple(num_items)}, seed={seed}: a synthetic pair needs a user or more, "
            f"{LEAST_ITEMS} items or more in each domain, and a seed of 0 or more."
        )
    rng = np.random.default_rng(seed)
    groups = min(GROUPS, min(num_items) // LEAST_ITEMS)
    total = sum(num_items)
    # Ids are given out at random: an id tells neither group nor place nor popularity.
    group = np.concatenate([rng.permutation(np.arange(size) % groups) for size in num_items])
    place = rng.standard_normal((total, DIMENSIONS))
    shelves = [_shelve(group[: num_items[0]], groups, 0), _shelve(group[num_items[0] :], groups, num_items[0])]
    log_popularity = np.zeros(total)
    for shelf in shelves:
        for row in shelf:
            row = rng.permutation(row[row >= 0])
            log_popularity[row] = -SKEW * np.log(1 + np.arange(len(row)))
    user_group = rng.integers(0, groups, num_users)
    lengths = _lengths(rng, num_users)
    in_b = _domains(rng, lengths)
    chosen = _choose(rng, in_b, novelty, user_group, shelves, place, log_popularity)
    days = _days(rng, in_b >= 0)
    kept = in_b >= 0
    owner = np.repeat(np.arange(num_users), lengths.sum(axis=1))
    items, times = 1 + chosen[kept], days[kept] * DAY
    order = np.lexsort((items, times, owner))
    names = np.array([f"a{i}" for i in range(1, 1 + num_items[0])] + [f"b{i}" for i in range(1, 1 + num_items[1])])
    users = np.array([str(user) for user in range(num_users)])
    events = Events(owner, items[order], times[order], users, names.astype(object))
    return Planted(events, (num_items[0], num_items[1]), place, group, user_group)


def _shelve(group: np.ndarray, groups: int, first: int) -> np.ndarray:
    """int64 (groups, most items of a group): the items of each group, counted from `first`, filled up with -1."""
    shelf = np.full((groups, int(np.bincount(group).max())), -1)
    for number in range(groups):
        members = np.flatnonzero(group == number)
        shelf[number, : len(members)] = first + members
    return shelf


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
    """int8 (users, 50): the domain of each event, -1 after the last. Users tend to stay in a domain for a while."""
    left = lengths.astype(float)
    in_b = np.full((len(lengths), MOST_EVENTS), -1, dtype=np.int8)
    before = np.full(len(lengths), -1)
    for step in range(MOST_EVENTS):
        odds_a = left[:, 0] * np.select([before == 0, before == 1], [STAY_ODDS, 1 / STAY_ODDS], 1.0)
        chance_b = left[:, 1] / np.maximum(odds_a + left[:, 1], 1e-300)
        before = (rng.random(len(lengths)) < chance_b).astype(int)
        active = left.sum(axis=1) > 0
        in_b[active, step] = before[active]
        left[active, before[active]] -= 1
    return in_b


def _choose(
    rng: np.random.Generator,
    in_b: np.ndarray,
    novelty: float,
    user_group: np.ndarray,
    shelves: list[np.ndarray],
    place: np.ndarray,
    log_popularity: np.ndarray,
) -> np.ndarray:
    """int64 (users, 50): the item of each event, counted from 0; arbitrary after the last."""
    users = len(in_b)

    def innovation() -> np.ndarray:
        common, private = rng.standard_normal((1, users, DIMENSIONS)), rng.standard_normal((2, users, DIMENSIONS))
        return novelty**0.25 * common + np.sqrt(1 - np.sqrt(novelty)) * private

    interest = innovation()  # (domain, user, dimension)
    free = [np.where(shelf >= 0, 0.0, -np.inf)[user_group] for shelf in shelves]
    chosen = np.zeros(in_b.shape, dtype=np.int64)
    for step in range(in_b.shape[1]):
        interest = PERSISTENCE * interest + np.sqrt(1 - PERSISTENCE**2) * innovation()
        for domain, shelf in enumerate(shelves):
            who = np.flatnonzero(in_b[:, step] == domain)
            candidates = shelf[user_group[who]]  # (users here, items of their group)
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
