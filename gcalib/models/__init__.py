"""The models: `build_model` makes the one that a config names."""

from __future__ import annotations

from gcalib.config import RunConfig
from gcalib.data.pair import Pair
from gcalib.models.abxi import ABXI
from gcalib.models.base import Recommender

MODELS: dict[str, type[Recommender]] = {"abxi": ABXI}


def build_model(config: RunConfig, pair: Pair) -> Recommender:
    """The model of `config` for `pair`, freshly initialised from torch's global random generator.

    Raises
    ------
    ValueError
        If the model needs one clock over both domains and the pair has none.
    """
    pair.require_clock(config.model)
    return MODELS[config.model](config, pair.num_items)


__all__ = ["MODELS", "Recommender", "build_model"]
