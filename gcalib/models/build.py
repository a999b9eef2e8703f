"""Which models there are, and how one is built from a config without `match`."""

from __future__ import annotations

from gcalib.config import RunConfig
from gcalib.data.pair import Pair
from gcalib.models.abxi import ABXI
from gcalib.models.base import Recommender
from gcalib.models.cdsrnp import CDSRNP
from gcalib.models.counting import Counting
from gcalib.models.llm4cdsr import LLM4CDSR
from gcalib.models.sasrec import MixedSASRec, SASRec

MODELS: dict[str, type[Recommender]] = {
    "abxi": ABXI,
    "cdsrnp": CDSRNP,
    "llm4cdsr": LLM4CDSR,
    "sasrec": SASRec,
    "sasrec-mixed": MixedSASRec,
    "popularity": Counting,
    "markov": Counting,
    "item-knn": Counting,
}


def build_plain(config: RunConfig, pair: Pair) -> Recommender:
    """The model that a config without `match` describes (see `gcalib.models.build_model`)."""
    kind = MODELS[config.model]
    if missing := [point for point in config.gca if point not in kind.points]:
        has = "; ".join(f"{point} ({where})" for point, where in kind.points.items()) or "none"
        raise ValueError(f"{config.model} has no insertion point {missing[0]}: it has {has}.")
    if kind.needs_clock:
        pair.require_clock(config.model)
    return kind.build(config, pair)
