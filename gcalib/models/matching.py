"""Building models, counting their parameters and operations, and the parameter-matched baseline (claim C4).

`RunConfig(gca=(0,), match="params")` is the plain model widened to as many parameters, embeddings included, as the one
with cross-attention, which is how the paper matches; `match="network"` to as many outside the item tables, to which
cross-attention adds nothing. The width d grows as far as it can without passing the target; the inner width of the
feed-forward layers takes up the rest, since a step of d changes the size by several percent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gcalib.config import MODEL_NAMES, RunConfig
from gcalib.data.batches import batches_of_users, events_per_domain
from gcalib.data.pair import Pair
from gcalib.models.abxi import ABXI
from gcalib.models.base import Recommender
from gcalib.models.baselines import CountingBaseline
from gcalib.models.cdsrnp import CDSRNP
from gcalib.models.llm4cdsr import LLM4CDSR
from gcalib.models.sasrec import MixedSASRec, SASRec

MODELS: dict[str, type[Recommender]] = {
    "abxi": ABXI,
    "cdsrnp": CDSRNP,
    "llm4cdsr": LLM4CDSR,
    "sasrec": SASRec,
    "sasrec-mixed": MixedSASRec,
    "popularity": CountingBaseline,
    "markov": CountingBaseline,
    "item-knn": CountingBaseline,
}
TOLERANCE = 0.01
MAX_STEPS = 1 << 12  # of width, in a search
SIZE = {"params": "params_total", "network": "params_network"}
# torch's counter knows the attention of GPUs only
CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def register(name: str, kind: type[Recommender]) -> None:
    """Make a model of one's own known, so that `RunConfig(model=name)` names it."""
    MODELS[name] = kind
    MODEL_NAMES.add(name)


def build_model(config: RunConfig, pair: Pair) -> Recommender:
    """The model of `config` for `pair`, freshly initialised from torch's global random generator.

    With `config.match`, the parameter-matched baseline.

    Raises
    ------
    ValueError
        If the model has no such insertion point, needs the order of events across the domains and the pair has none,
        or cannot be matched.
    """
    if config.match:
        config = matched(config, pair).config
    kind = MODELS[config.model]
    if missing := [point for point in config.gca if point not in kind.points]:
        has = "; ".join(f"{point} ({where})" for point, where in kind.points.items()) or "none"
        raise ValueError(f"{config.model} has no insertion point {missing[0]}: it has {has}.")
    if kind.needs_global_order:
        pair.require_global_order(config.model)
    return kind.build(config, pair)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by kind.

    Returns
    -------
    dict
        `params_total`; `params_trainable`; `params_embedding`, those of the embedding tables; `params_network`, the
        trainable ones outside the tables.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sizes = [(p.numel(), p.requires_grad, id(p) in tables) for p in model.parameters()]
    return {
        "params_total": sum(size for size, _, _ in sizes),
        "params_trainable": sum(size for size, trained, _ in sizes if trained),
        "params_embedding": sum(size for size, _, table in sizes if table),
        "params_network": sum(size for size, trained, table in sizes if trained and not table),
    }


def sizes(config: RunConfig, pair: Pair) -> dict[str, int]:
    """`parameter_counts` of a config; nothing is allocated for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameter_counts(build_model(config, pair))


def flops_per_step(model: Recommender, pair: Pair, batch_size: int) -> int:
    """Floating-point operations of the matrix products and attention of one training step, forward and backward.

    Counted by torch on the batch of an epoch that is of median size (rows with pads), on the device that holds the
    model. The model's gradients are cleared.
    """
    device = next(model.parameters()).device
    training = pair.split("val")
    batches = list(batches_of_users(events_per_domain(pair, training), batch_size, np.random.default_rng(0)))
    users = sorted(batches, key=lambda users: len(users) * training.lengths[users].max())[len(batches) // 2]
    batch = model.collate([training.history(user) for user in users], pair, training=True, users=users)
    negatives = model.negatives(batch, np.random.default_rng(0)).to(device)
    was_training = model.training
    model.train()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), counter:
        torch.manual_seed(0)  # a model may draw which users it reads, and the count should not depend on the process
        torch.stack(list(model.loss(batch.to(device), negatives).values())).sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return int(counter.get_total_flops())


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
        """What a record says of the match."""
        return {
            "match_size": self.size, "match_target": self.target,
            "match_dim": self.config.dim, "match_hidden": self.config.hidden or 0,
        }  # fmt: skip


def matched(config: RunConfig, pair: Pair) -> Match:
    """The parameter-matched baseline of a config with `match`.

    Raises
    ------
    ValueError
        If the model takes no cross-attention, or no width comes within 1% of the size.
    """
    assert config.match is not None
    if not MODELS[config.model].points:
        able = ", ".join(name for name, kind in MODELS.items() if kind.points)
        raise ValueError(f"{config.model} cannot be matched: it takes no cross-attention; {able} do.")

    def size(candidate: RunConfig) -> int:
        return sizes(candidate, pair)[SIZE[str(config.match)]]

    with_attention = config.replace(match=None)
    plain, target = with_attention.replace(gca=()), size(with_attention)
    step = plain.self_heads
    wider = _nearest(lambda n: plain.replace(dim=plain.dim + n * step), size, target)
    wide = wider.config if wider.size <= target else plain.replace(dim=wider.config.dim - step)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        inner = build_model(wide, pair).hidden
    fuller = _nearest(lambda n: wide.replace(hidden=inner + n) if n else wide, size, target)
    best = min(wider, fuller, key=lambda match: match.error)
    if best.error > TOLERANCE:
        raise ValueError(
            f"{config.model} cannot be matched: the nearest size is {best.size:,}, {best.error:.1%} off the "
            f"{target:,} of gca={config.gca}."
        )
    return best


def _nearest(change: Callable[[int], RunConfig], size: Callable[[RunConfig], int], target: int) -> Match:
    """Bisection over steps of a width, with which size grows: the nearer of the two that enclose the target."""

    @functools.cache
    def at(step: int) -> int:
        return size(change(step))

    low, high = 0, 1
    while at(high) < target and high < MAX_STEPS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    step = min(low, high, key=lambda step: abs(at(step) - target))
    return Match(change(step), at(step), target)
