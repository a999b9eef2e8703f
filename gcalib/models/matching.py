"""The twin of a model with cross-attention: the plain baseline, widened until it is as large (claim C4).

`RunConfig(gca=(0,), match="params")` is that twin: everything but `match` names the model with cross-attention, and
`matched` finds the plain config of the same size. Size is the number of trainable parameters outside the embedding
tables (`params_network` of a record), since cross-attention adds none to the tables, or the operations of a training
step (`match="flops"`). The tables of a wider model are larger too; a record holds all counts, so what the twin gains
there is in sight.

Axes:

    width     d of embeddings and states. A step of d changes the size by several percent, so the feed-forward's
              inner width takes up the rest.
    hidden    inner width of the feed-forward layers
    layers    self-attention layers: coarse, seldom within a percent
    rank      ABXI's LoRA ranks, both by the same number
    adapter   inner width of LLM4CDSR's text adapter
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gcalib.config import READ_BY, RunConfig
from gcalib.data.pair import Pair
from gcalib.models.build import build_plain
from gcalib.models.cost import flops_per_step, parameter_counts

TOLERANCE = 0.01
LARGEST = 1 << 12  # steps along an axis

AXES = {
    "abxi": ("width", "hidden", "rank"),
    "cdsrnp": ("width", "hidden", "layers"),
    "llm4cdsr": ("width", "hidden", "layers", "adapter"),
}


@dataclass(frozen=True)
class Match:
    """The plain config found, its size, and the size it was to have."""

    config: RunConfig
    size: int
    target: int

    @property
    def error(self) -> float:
        """How far the size is off, as a share of the target."""
        return abs(self.size - self.target) / self.target

    def facts(self) -> dict[str, int]:
        """What a record says of the match: both sizes, and the widths of the plain config that its model reads."""
        model = self.config.model
        fields = ("dim", "hidden", "layers", "domain_rank", "invariant_rank", "adapter")
        read = {name: getattr(self.config, name) for name in fields if model in READ_BY.get(name, (model,))}
        return {
            "match_size": self.size, "match_target": self.target,
            **{f"match_{name}": width for name, width in read.items() if width},
        }  # fmt: skip


def matched(config: RunConfig, pair: Pair) -> Match:
    """The plain twin of a config with `match`.

    Raises
    ------
    ValueError
        If the model takes no cross-attention, or has no such axis (the message names those it has), or no value along
        it comes within 1%.
    """
    axes = AXES.get(config.model)
    if axes is None:
        raise ValueError(f"{config.model} cannot be matched: it takes no cross-attention; {', '.join(AXES)} do.")
    if config.match_axis not in axes:
        raise ValueError(f"{config.model} cannot be matched along {config.match_axis}; its axes are {', '.join(axes)}.")
    twin = config.but(match=None, match_axis="width")
    plain = twin.but(gca=())

    def size(candidate: RunConfig) -> int:
        return _flops(candidate, pair) if config.match == "flops" else sizes(candidate, pair)["params_network"]

    target = size(twin)
    best = _search(plain, config.match_axis, size, target, pair)
    if config.match_axis == "width":
        # the widest that is not too large, then a wider feed-forward
        wide = best.config if best.size <= target else best.config.but(dim=best.config.dim - best.config.self_heads)
        best = min(best, _search(wide, "hidden", size, target, pair), key=lambda match: match.error)
    if best.error > TOLERANCE:
        others = [axis for axis in axes if axis != config.match_axis]
        raise ValueError(
            f"{config.model} cannot be matched along {config.match_axis}: the nearest size is {best.size:,}, "
            f"{best.error:.1%} off the {target:,} of gca={config.gca}; try {' or '.join(others)}."
        )
    return best


def sizes(config: RunConfig, pair: Pair) -> dict[str, int]:
    """`gcalib.models.cost.parameter_counts` of a config without `match`; nothing is allocated for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameter_counts(build_plain(config, pair))


def _flops(config: RunConfig, pair: Pair) -> int:
    with torch.random.fork_rng(devices=[]):
        return flops_per_step(build_plain(config, pair), pair, config.batch_size)


def _search(start: RunConfig, axis: str, size: Callable[[RunConfig], int], target: int, pair: Pair) -> Match:
    """Bisection along an axis, on which size grows: the nearest of the two values that enclose the target."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        now = build_plain(start, pair).widths

    def change(step: int) -> RunConfig:
        if step == 0:
            return start
        if axis == "width":
            return start.but(dim=start.dim + step * start.self_heads)
        if axis == "rank":
            return start.but(domain_rank=start.domain_rank + step, invariant_rank=start.invariant_rank + step)
        return start.but(**{axis: now[axis] + step})

    @functools.cache
    def at(step: int) -> int:
        return size(change(step))

    low, high = 0, 1
    while at(high) < target and high < LARGEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    step = min(low, high, key=lambda step: abs(at(step) - target))
    return Match(change(step), at(step), target)
