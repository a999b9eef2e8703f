"""Evaluation of any `Recommender`: ranks of the held-out events, scores, recommendations, alignment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gcalib.alignment import AlignmentMeter
from gcalib.attention import record_activations
from gcalib.data.batches import batches_of_users, events_per_domain, items_of
from gcalib.data.pair import DataError, Pair, Split, SplitName
from gcalib.data.text import item_text
from gcalib.models.base import Recommender
from gcalib.ranking import expected, metrics, rank_among, rank_of_target

EVAL_USERS = 512  # users per evaluation batch
SAMPLED = {"s999": 999, "s100": 100}


@torch.no_grad()
def evaluate(
    model: Recommender,
    pair: Pair,
    split: SplitName,
    *,
    protocols: Sequence[str] = ("full", "s999", "s100"),
    alignment: bool = True,
) -> dict[str, float]:
    """Rank every target and measure every cross-attention, in one pass over the users.

    A user has one target, or one in each domain where there is no global order (`gcalib.data.pair`). The sampled
    protocols are read out of the full ranking's scores. A protocol for which a domain has too few items is left out,
    and so is the target of a user who has every item of its domain. Without any protocol nothing is ranked.

    Returns
    -------
    dict
        `<domain>.<candidates>.<metric>` and `<domain>.gca<point>.<measure>`, domain a or b. Beside a sampled protocol
        stands the mean over all its draws (`s999_expected`, see `gcalib.ranking.expected`); beside `full` stands
        `full_seen`: the same over targets that occur in training; and, if some users are active in one domain only,
        `full_both` and `full_single`: over the targets of users active in both domains and in one.
    """
    device = _device(model)
    parts = pair.split(split)
    smallest = min(pair.num_items) - int(pair.lengths.max())
    sampled = {
        name: pair.candidates(split, SAMPLED[name])
        for name in protocols
        if name in SAMPLED and smallest >= SAMPLED[name]
    }
    target_domain = pair.domain_of(parts.targets)
    example = np.full((pair.num_users, 2), -1)  # of each user in each domain
    example[parts.users, target_domain] = np.arange(len(parts))
    ranks = {name: np.empty(len(parts)) for name in ("full", *sampled)}
    meters: dict[str, AlignmentMeter] = {}
    domains = (0, 1) if protocols else ()
    scorers = [model.scorer(domain) for domain in domains]
    was_training = model.training
    model.eval()
    with record_activations(model) as recorded:
        for users in batches_of_users(events_per_domain(pair, parts), EVAL_USERS, None):
            states = model(model.collate([parts.history(user) for user in users], pair, training=False).to(device))
            for domain in domains:
                places = np.flatnonzero(example[users, domain] >= 0)
                asked = example[users[places], domain]
                if len(asked) == 0:
                    continue
                first = items_of(pair.num_items, domain).start
                scores = scorers[domain](states[domain][torch.from_numpy(places).to(device), 0])
                target = torch.from_numpy(parts.targets[asked] - first).to(device)
                row, column = (t.to(device) for t in _interacted(pair, parts.users[asked], domain))
                ranks["full"][asked] = rank_of_target(scores, target, (row, column)).cpu().numpy()
                of_target = scores.gather(1, target.unsqueeze(1)).squeeze(1)
                for name, candidates in sampled.items():
                    others = scores.gather(1, torch.from_numpy(candidates[asked] - first).to(device))
                    ranks[name][asked] = rank_among(of_target, others).cpu().numpy()
            for one in recorded if alignment else ():
                meter = meters.setdefault(one.name, AlignmentMeter())
                meter.update(one.x, one.x_prime, one.mask, y=one.y, gate=one.gate, update=one.update)
            recorded.clear()
    model.train(was_training)

    result: dict[str, float] = {}
    known = ~pair.unseen_targets(split)
    full_size = _full_candidates(pair, parts)
    groups = {"seen": known}
    if not pair.in_both.all():
        groups |= {"both": pair.in_both[parts.users], "single": ~pair.in_both[parts.users]}
    for domain in domains:
        letter, mine = "ab"[domain], (target_domain == domain) & (full_size > 1)
        for name in ranks if mine.any() else ():
            size = full_size if name == "full" else np.full(len(parts), 1 + SAMPLED[name])
            _put(result, f"{letter}.{name}", metrics(ranks[name][mine], size[mine]))
            if name != "full":
                over_draws = expected(ranks["full"][mine], full_size[mine], SAMPLED[name])
                _put(result, f"{letter}.{name}_expected", over_draws)
        for name, group in groups.items():
            if (chosen := mine & group).any():
                _put(result, f"{letter}.full_{name}", metrics(ranks["full"][chosen], full_size[chosen]))
        result[f"{letter}.targets"] = int(mine.sum())
        result[f"{letter}.targets_unseen"] = int((mine & ~known).sum())
        if alone := int((target_domain == domain).sum() - mine.sum()):
            result[f"{letter}.targets_without_other_items"] = alone
    for name, meter in meters.items():
        _put(result, name, meter.result())
    return result


@torch.no_grad()
def score(model: Recommender, pair: Pair, histories: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Scores of every item of both domains as the next event of each history.

    Parameters
    ----------
    histories
        Item ids, oldest first (on a per-domain pair: oldest first in each domain); of a long history the model looks
        at the newest `model.window` events.

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
    arrays = []
    for number, history in enumerate(histories):
        array = np.asarray(history)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise ValueError(f"History {number} must be a list of item ids (integers), at least one.")
        if array.min() < 1 or array.max() > total:
            raise ValueError(f"History {number} holds an item id outside 1..{total}, the items of {pair.name}.")
        arrays.append(array.astype(np.int64))
    result = np.full((len(arrays), 1 + total), -np.inf, dtype=np.float32)
    device, was_training = _device(model), model.training
    model.eval()
    scorers = [model.scorer(domain) for domain in (0, 1)]
    for start in range(0, len(arrays), EVAL_USERS):
        states = model(model.collate(arrays[start : start + EVAL_USERS], pair, training=False).to(device))
        both = [scorer(state[:, 0]) for scorer, state in zip(scorers, states, strict=True)]
        result[start : start + EVAL_USERS, 1:] = torch.cat(both, dim=1).float().cpu().numpy()
    model.train(was_training)
    return result


def recommend(
    model: Recommender, pair: Pair, histories: Sequence[Sequence[int] | np.ndarray], domain: str = "A", k: int = 10
) -> pd.DataFrame:
    """The k best items of a domain for each history, none of which is in it.

    Parameters
    ----------
    histories
        As in `score`.
    domain
        `"A"` or `"B"`, or the domain's name.

    Returns
    -------
    pandas.DataFrame
        One row per recommendation: `history` (its number), `rank` from 1, `item` (id), `name` (original id), `title`
        (where known) and `score`.

    Raises
    ------
    ValueError
        As `score`, and for another domain or a k beyond the domain's items.
    """
    letters = {"A": 0, "B": 1, **{name: number for number, name in enumerate(pair.domains)}}
    if domain not in letters:
        a, b = pair.domains
        raise ValueError(f"domain={domain!r} is unknown; {pair.name} has A ({a}) and B ({b}).")
    items = items_of(pair.num_items, letters[domain])
    size = items.stop - items.start
    if not 1 <= k <= size:
        raise ValueError(f"k={k} must be 1 to {size}, the items of {pair.domains[letters[domain]]}.")
    scores = score(model, pair, histories)
    for row, history in zip(scores, histories, strict=True):
        row[np.asarray(history)] = -np.inf
    best = (np.argsort(-scores[:, items], axis=1, kind="stable")[:, :k] + items.start).ravel()
    owner = np.repeat(np.arange(len(scores)), k)
    names = np.arange(1, 1 + sum(pair.num_items)).astype(str) if pair.item_names is None else pair.item_names
    table = pd.DataFrame(
        {"history": owner, "rank": np.tile(np.arange(1, k + 1), len(scores)), "item": best, "name": names[best - 1]}
    )
    with suppress(DataError):  # texts of published items may not be on this machine
        texts = item_text(pair).texts
        if any(texts):
            table["title"] = [texts[item - 1] or "" for item in best]
    table["score"] = scores[owner, best]
    return table[np.isfinite(table["score"])].reset_index(drop=True)


def _device(model: Recommender) -> torch.device:
    """Where a model is; one without parameters computes on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _put(result: dict[str, float], prefix: str, values: dict[str, float]) -> None:
    result.update({f"{prefix}.{name}": value for name, value in values.items()})


def _interacted(pair: Pair, users: np.ndarray, domain: int) -> tuple[Tensor, Tensor]:
    """(row, column) of all items of the domain that the users interacted with, the target among them."""
    lengths = pair.lengths[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    items = np.concatenate([pair.sequence(user) for user in users])
    mine = pair.domain_of(items) == domain
    first = items_of(pair.num_items, domain).start
    return torch.from_numpy(rows[mine]), torch.from_numpy(items[mine] - first)


def _full_candidates(pair: Pair, split: Split) -> np.ndarray:
    """Candidates of the full protocol for each target: its domain less what else the user interacted with there."""
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    items = np.unique(np.stack([owner * 2 + pair.domain_of(pair.items), pair.items]), axis=1)
    known = np.bincount(items[0], minlength=2 * pair.num_users)
    domain = pair.domain_of(split.targets)
    size: np.ndarray = np.asarray(pair.num_items)[domain] - known[split.users * 2 + domain] + 1
    return size
