"""The models: `build_model` makes the one that a config names."""

from __future__ import annotations

from gcalib.config import RunConfig
from gcalib.data.pair import Pair
from gcalib.models.base import Recommender
from gcalib.models.build import MODELS, build_plain
from gcalib.models.matching import AXES, matched, sizes


def build_model(config: RunConfig, pair: Pair) -> Recommender:
    """The model of `config` for `pair`, freshly initialised from torch's global random generator.

    With `config.match`, the plain model that is as large as the one with cross-attention.

    Raises
    ------
    ValueError
        If the model has no such insertion point, needs one clock over both domains and the pair has none, or cannot
        be matched.
    """
    return build_plain(matched(config, pair).config if config.match else config, pair)


__all__ = ["AXES", "MODELS", "Recommender", "build_model", "matched", "sizes"]
