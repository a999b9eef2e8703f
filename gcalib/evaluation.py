"""Evaluation and scoring of any `Recommender`: ranks of the held-out events, and what cross-attention did to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gcalib.alignment import AlignmentMeter
from gcalib.attention import tapping
from gcalib.data.batches import Batch, length_batches, make_batch
from gcalib.data.pair import Pair, Split, SplitName
from gcalib.models import Recommender
from gcalib.ranking import expected, metrics, rank_among, rank_of_target

EVAL_USERS = 512  # users an evaluation batch
SAMPLED = {"s999": 999, "s100": 100}


@torch.no_grad()
def evaluate(
    model: Recommender,
    pair: Pair,
    split: SplitName,
    *,
    protocols: Sequence[str] = ("full", "s999", "s100"),
    alignment: bool = True,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Rank every target and measure every cross-attention, in one pass over the users.

    A user has one target, or without a common clock one in each domain (`gcalib.data.split`). The sampled
    protocols are read out of the full ranking's scores. A protocol for which a domain has too few items is left out.
    Without any protocol nothing is ranked.

    Returns
    -------
    dict
        `<domain>.<candidates>.<metric>` and `<domain>.gca<point>.<measure>`, domain a or b. Beside a sampled protocol
        stands the mean over all its draws (`s999_expected`, see `gcalib.ranking.expected`); beside `full` stands
        `full_seen`: the same over targets that occur in training; and, if some users are active in one domain only,
        `full_both` and `full_single`: over the targets of users active in both domains and in one.
    """
    device = device or _device(model)
    parts = pair.split(split)
    fitting = [name for name in protocols if name in SAMPLED and _fits(pair, name)]
    sampled = {name: pair.candidates(split, SAMPLED[name]) for name in fitting}
    owner = pair.domain_of(parts.targets)
    example = np.full((pair.num_users, 2), -1)  # of each user in each domain
    example[parts.users, owner] = np.arange(len(parts))
    ranks = {name: np.zeros(len(parts)) for name in ("full", *sampled)}
    meters: dict[str, AlignmentMeter] = {}
    ranked = (0, 1) if protocols else ()
    scorers = [model.scorer(domain) for domain in ranked]
    was_training = model.training
    model.eval()
    with tapping(model) as taps:
        for users in length_batches(parts.lengths, EVAL_USERS, None):
            histories = [parts.history(user) for user in users]
            states = model(_evaluation_batch(model, histories, pair.has_clock).to(device))
            for domain in ranked:
                places = np.flatnonzero(example[users, domain] >= 0)
                asked = example[users[places], domain]
                if len(asked) == 0:
                    continue
                first = 1 + domain * pair.num_items[0]
                rows = torch.from_numpy(places).to(device)
                scores = scorers[domain](states[domain][rows])
                target = torch.from_numpy(parts.targets[asked] - first).to(device)
                row, column = (t.to(device) for t in _interacted(pair, parts.users[asked], domain))
                ranks["full"][asked] = rank_of_target(scores, target, (row, column)).cpu().numpy()
                of_target = scores.gather(1, target.unsqueeze(1)).squeeze(1)
                for name, candidates in sampled.items():
                    others = scores.gather(1, torch.from_numpy(candidates[asked] - first).to(device))
                    ranks[name][asked] = rank_among(of_target, others).cpu().numpy()
            if alignment:
                for tap in taps:
                    x, x_prime, y, gate = (tap.padded(t) for t in (tap.x, tap.x_prime, tap.y, tap.gate))
                    meters.setdefault(tap.name, AlignmentMeter()).update(x, x_prime, tap.real(), y=y, gate=gate)
            taps.clear()
    model.train(was_training)

    result: dict[str, float] = {}
    known = ~pair.unseen_targets(split)
    full_size = _full_candidates(pair, parts)
    groups = {"seen": known}
    if not pair.in_both.all():
        groups |= {"both": pair.in_both[parts.users], "single": ~pair.in_both[parts.users]}
    for domain in ranked:
        letter, mine = "ab"[domain], owner == domain
        for name in ranks:
            size = full_size if name == "full" else np.full(len(parts), 1 + SAMPLED[name])
            _put(result, f"{letter}.{name}", metrics(ranks[name][mine], size[mine]) if mine.any() else {})
        for name in sampled if mine.any() else ():
            over_draws = expected(ranks["full"][mine], full_size[mine], SAMPLED[name])
            _put(result, f"{letter}.{name}_expected", over_draws)
        for name, group in groups.items():
            if (chosen := mine & group).any():
                _put(result, f"{letter}.full_{name}", metrics(ranks["full"][chosen], full_size[chosen]))
        result[f"{letter}.targets"] = int(mine.sum())
        result[f"{letter}.targets_unseen"] = int((mine & ~known).sum())
    for name, meter in meters.items():
        _put(result, name, meter.result())
    return result


def _device(model: Recommender) -> torch.device:
    """Where a model is; one without parameters computes on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _put(result: dict[str, float], prefix: str, values: dict[str, float]) -> None:
    result.update({f"{prefix}.{name}": value for name, value in values.items()})


def _fits(pair: Pair, protocol: str) -> bool:
    longest = int(pair.lengths.max())
    return min(pair.num_items) - longest >= SAMPLED[protocol]


def _evaluation_batch(model: Recommender, histories: list[np.ndarray], has_clock: bool) -> Batch:
    return make_batch(
        histories, model.num_items[0], window=model.window, training=False, as_published=model.as_published,
        clock=has_clock,
    )  # fmt: skip


def _interacted(pair: Pair, users: np.ndarray, domain: int) -> tuple[Tensor, Tensor]:
    """(row, column) of all items of the domain that the users interacted with, the target among them."""
    lengths = pair.lengths[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    events = np.repeat(pair.offsets[users], lengths) + place
    items = pair.items[events]
    mine = pair.domain_of(items) == domain
    first = 1 + domain * pair.num_items[0]
    return torch.from_numpy(rows[mine]), torch.from_numpy(items[mine] - first)


def _full_candidates(pair: Pair, split: Split) -> np.ndarray:
    """Candidates of the full protocol for each target: its domain less what else the user interacted with there."""
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    items = np.unique(np.stack([owner * 2 + pair.domain_of(pair.items), pair.items]), axis=1)
    known = np.bincount(items[0], minlength=2 * pair.num_users)
    domain = pair.domain_of(split.targets)
    size: np.ndarray = np.asarray(pair.num_items)[domain] - known[split.users * 2 + domain] + 1
    return size


@torch.no_grad()
def score(model: Recommender, pair: Pair, histories: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Scores of every item of both domains as the next event of each history.

    Parameters
    ----------
    histories
        Item ids, oldest first (without a common clock: oldest first in each domain); of a long history the model
        looks at the newest `model.window` events.

    Returns
    -------
    np.ndarray
        float32 (len(histories), 1 + nA + nB). Column i is item i; column 0, padding, is minus infinity. Scores
        compare items of one domain; across domains they are comparable only as far as training made them so.

    Raises
    ------
    ValueError
        For an empty history, or an id outside 1..nA+nB; the message names the history.
    """
    total = sum(pair.num_items)
    arrays = [np.asarray(history, dtype=np.int64) for history in histories]
    for number, history in enumerate(arrays):
        if history.ndim != 1 or len(history) == 0:
            raise ValueError(f"History {number} must be a list of at least one item id.")
        if history.min() < 1 or history.max() > total:
            raise ValueError(f"History {number} holds an item id outside 1..{total}, the items of {pair.name}.")
    result = np.full((len(arrays), 1 + total), -np.inf, dtype=np.float32)
    device = _device(model)
    was_training = model.training
    model.eval()
    scorers = [model.scorer(domain) for domain in (0, 1)]
    for users in length_batches(np.array([len(a) for a in arrays], dtype=np.int64), EVAL_USERS, None):
        states = model(_evaluation_batch(model, [arrays[user] for user in users], pair.has_clock).to(device))
        both = [scorer(state) for scorer, state in zip(scorers, states, strict=True)]
        result[users, 1:] = torch.cat(both, dim=1).float().cpu().numpy()
    model.train(was_training)
    return result
