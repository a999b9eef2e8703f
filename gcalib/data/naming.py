"""Titles for the items of the built-in pair, so that text tells what was planted, and some noise besides."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

GROUPS = ("garden", "kitchen", "office", "travel", "music", "sports", "nursery", "workshop")
# Eighths of the plane of items along its two axes, from one end to the other.
COLOURS = ("violet", "blue", "teal", "green", "yellow", "orange", "red", "brown")
MATERIALS = ("paper", "cotton", "leather", "wooden", "plastic", "glass", "copper", "steel")
NOISE = (
    "classic", "deluxe", "new", "premium", "portable", "double", "small", "large", "original", "simple", "folding",
    "vintage", "modern", "round", "light", "heavy", "quick", "gift", "value", "set", "pack", "refill", "kit", "pair",
)  # fmt: skip


def planted_titles(factors: np.ndarray, groups: np.ndarray, seed: int) -> list[str]:
    """A title for each item: words of its group and of its place, between two words that tell nothing.

    Parameters
    ----------
    factors
        float (items, 2), the places of the items, standard normal.
    groups
        int (items,), their groups.
    seed
        Of the words that tell nothing; they have a generator of their own.

    Returns
    -------
    list
        Such as "vintage blue wooden office set".
    """
    rng = np.random.default_rng([seed, 2])
    edges = [NormalDist().inv_cdf(number / len(COLOURS)) for number in range(1, len(COLOURS))]
    place = np.searchsorted(edges, factors)
    noise = rng.integers(0, len(NOISE), (len(groups), 2))
    return [
        f"{NOISE[before]} {COLOURS[x]} {MATERIALS[y]} {GROUPS[group]} {NOISE[after]}"
        for (x, y), group, (before, after) in zip(place, groups, noise, strict=True)
    ]
