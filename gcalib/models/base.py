"""What every model offers to training, evaluation and measurement, and the losses that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch
from gcalib.data.pair import Pair

REDRAWS = 20  # of a negative that the user has; not for ever, since a user may have the whole domain


class Recommender(nn.Module, ABC):
    """A model of users' next items in two domains, A (0) and B (1).

    Attributes
    ----------
    points
        The insertion points of gated cross-attention that the model has, and where they are.
    needs_clock
        Whether it needs the order of events across the two domains.
    trained
        False for a yardstick without parameters: `fit` only evaluates it.
    num_items
        Items of A and of B; ids 1..nA are A's, nA+1..nA+nB are B's, 0 is padding.
    window
        Events of a history that the model looks at, the newest ones.
    as_published, reads_tails
        Passed on to `make_batch` (as `as_published` and `tails`).
    num_negatives, negative_groups
        Negatives that a training step draws for each of the groups (see `negatives`).
    own_negatives
        Whether they may be items of the user's own (see `spared`).
    item
        Table (1 + nA + nB, d) of the items' embeddings, where the model has one.
    """

    points: ClassVar[dict[int, str]] = {}
    needs_clock: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    num_items: tuple[int, int]
    window: int
    as_published: bool = False
    reads_tails: bool = False
    num_negatives: int
    negative_groups: int = 1
    own_negatives: bool = True
    item: nn.Embedding

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        """A fresh model for a pair; a model that reads more of the pair than its sizes overrides this."""
        return cls(config, pair.num_items)

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        """States that predict: in training one for each query of `batch`, in evaluation one a user, in A and in B."""

    def item_vectors(self, domain: int) -> Float[Tensor, "items dim"]:
        """Vectors of a domain's items, in order of id: the score of an item is its dot product with a state.

        By default the rows of `item`; a model that scores otherwise overrides this.
        """
        nA, nB = self.num_items
        return self.item.weight[1 : 1 + nA] if domain == 0 else self.item.weight[1 + nA : 1 + nA + nB]

    def scorer(self, domain: int) -> Callable[[Tensor], Tensor]:
        """A function from states of a domain (users, dim) to the scores of its items (users, items).

        Made once for many batches, since the items' vectors may take some computing.
        """
        vectors = self.item_vectors(domain)
        return lambda states: states @ vectors.T

    @abstractmethod
    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """Training losses by name, to be added up: `"a"` and `"b"` of the two domains, and what else a model has."""

    def negatives(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """What `loss` gets as negatives: by default `draw_negatives`, item ids shared by the whole batch.

        With several groups, a row of them for each: every part of the batch has negatives of its own. It costs no more
        products, and many more items get a gradient at each step, which is what their tables wait for.
        """
        drawn = [draw_negatives(rng, self.num_items, self.num_negatives) for _ in range(self.negative_groups)]
        return torch.stack(drawn) if self.negative_groups > 1 else drawn[0]

    def spared(
        self, batch: Batch
    ) -> tuple[Int[Tensor, "queries_a items"] | None, Int[Tensor, "queries_b items"] | None]:
        """The items that are no negatives of each query of A and of B, beside its target; None where there are none."""
        if self.own_negatives:
            return None, None
        items = items_of_users(batch)
        of_a, of_b = (items[queries.sequence] for queries in batch.queries)
        return of_a, of_b

    @property
    def widths(self) -> dict[str, int]:
        """What the config's None came to: inner width `hidden`, and `layers` or `adapter` where the model has them."""
        raise NotImplementedError(f"{type(self).__name__} has no widths to match.")

    def facts(self) -> dict[str, Any]:
        """What a record has to say of this model beside its config: columns by name."""
        return {}


def start_small(module: nn.Module) -> None:
    """Start a linear layer or an embedding table of a transformer, for `nn.Module.apply`.

    Tables are small, as the official Xavier start of a large table is: from N(0, 1 / d) it takes several times the
    epochs.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        module.weight.data[0].zero_()


def draw_negatives(rng: np.random.Generator, num_items: tuple[int, int], count: int) -> Int[Tensor, " negatives"]:
    """Item ids, half from each domain (or the whole domain where it is smaller), none twice."""
    nA, nB = num_items
    drawn = [rng.choice(size, min(size, count // 2), replace=False, shuffle=False) for size in (nA, nB)]
    return torch.from_numpy(np.concatenate([1 + drawn[0], 1 + nA + drawn[1]]))


def draw_new_to_users(
    rng: np.random.Generator, num_items: tuple[int, int], batch: Batch
) -> tuple[Int[Tensor, " queries_a"], Int[Tensor, " queries_b"]]:
    """One item id for each query of a training batch, of the query's domain, that is none of its user's items."""
    nA, nB = num_items
    key = 1 + nA + nB  # of a user and an item
    bought = items_of_users(batch).cpu().numpy() + key * np.arange(batch.size)[:, None]
    drawn = []
    for first, size, query in zip((1, 1 + nA), num_items, batch.queries, strict=True):
        who = query.sequence.cpu().numpy()
        sampled = rng.integers(first, first + size, len(who))
        for _ in range(REDRAWS):
            again = np.flatnonzero(np.isin(who * key + sampled, bought))
            if len(again) == 0:
                break
            sampled[again] = rng.integers(first, first + size, len(again))
        drawn.append(torch.from_numpy(sampled))
    return drawn[0], drawn[1]


def shared_logits(
    states: Float[Tensor, "queries dim"],
    targets: Int[Tensor, " queries"],
    target_vectors: Float[Tensor, "queries dim"],
    negatives: Int[Tensor, "*groups negatives"],
    negative_vectors: Float[Tensor, "*groups negatives dim"],
    spared: Int[Tensor, "queries items"] | None = None,
) -> tuple[Float[Tensor, " queries"], Float[Tensor, "queries negatives"]]:
    """Scores of each query's target and of negatives shared by all queries, as one matrix product.

    With groups, the queries are cut into as many parts of equal length, and each part has the negatives of its row. A
    target drawn as a negative is no negative of its own query: its score there is minus infinity. So it is with the
    items that `spared` lists for the query (0 is none). A row of negatives may name an item
    once only.
    """
    positive = (states * target_vectors).sum(dim=1)
    if not negatives.numel():
        return positive, states.new_zeros(len(states), 0)
    count = negatives.size(-1)
    groups = negatives.numel() // count
    size = -(-len(states) // groups)
    spare = groups * size - len(states)
    parted = F.pad(states, (0, 0, 0, spare)).view(groups, size, states.size(1)) if groups > 1 else states
    # the softmax over a thousand negatives needs more digits than bf16 has
    negative = (parted @ negative_vectors.transpose(-1, -2)).to(positive.dtype)
    negative = negative.view(groups * size, count)[: len(states)]
    ordered, place = negatives.view(groups, count).sort()
    apart = targets.unsqueeze(1) if spared is None else torch.cat([targets.unsqueeze(1), spared], dim=1)
    wanted = F.pad(apart, (0, 0, 0, spare)).view(groups, -1)
    found = torch.searchsorted(ordered, wanted).clamp_(max=count - 1)
    hit = (ordered.gather(1, found) == wanted).view(-1)[: apart.numel()].nonzero().squeeze(1)
    column = place.gather(1, found).view(-1)[hit]
    return positive, negative.index_put((hit // apart.size(1), column), negative.new_tensor(float("-inf")))


def items_of_users(batch: Batch) -> Int[Tensor, "users items"]:
    """Ids of the items in each user's training sequence as the batch has it, in either domain; 0 fills up a row."""
    if len(batch.mixed.items):  # it holds all but the newest event, which is a target
        held = [(batch.mixed.sequence, batch.mixed.items)]
        held += [(query.sequence[query.last], query.targets[query.last]) for query in batch.queries]
    else:  # without a common clock; an item may be listed twice
        held = [(s.sequence, s.items) for s in batch.own] + [(q.sequence, q.targets) for q in batch.queries]
    owner, items = (torch.cat(parts) for parts in zip(*held, strict=True))
    owner, order = owner.sort(stable=True)
    counts = owner.bincount(minlength=batch.size)
    column = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    rows = items.new_zeros(batch.size, int(counts.max()))
    rows[owner, column] = items[order]
    return rows


def info_nce(
    positive: Float[Tensor, " queries"],
    negative: Float[Tensor, "queries negatives"],
    weight: Float[Tensor, " queries"],
) -> Float[Tensor, ""]:
    """Weighted sum of `-log softmax` of the positive logit among itself and the negatives (van den Oord 2018)."""
    normaliser = torch.logaddexp(positive, negative.logsumexp(dim=1))
    return ((normaliser - positive) * weight).sum()


def binary_cross_entropy(
    positive: Float[Tensor, " queries"],
    negative: Float[Tensor, "queries negatives"],
    weight: Float[Tensor, " queries"],
) -> Float[Tensor, ""]:
    """Weighted sum of `-log sigmoid(positive)` and the mean `-log sigmoid(-negative)` (Kang & McAuley 2018, eq. 6).

    Theirs has one negative a target; here there may be many, which are averaged.

    A negative at minus infinity (a target drawn as its own negative, a spared item) counts nothing.
    """
    real: Bool[Tensor, "queries negatives"] = torch.isfinite(negative)
    wrong = F.softplus(negative).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return ((F.softplus(-positive) + wrong) * weight).sum()


def soft_contrast(x: Float[Tensor, "users dim"], y: Float[Tensor, "users dim"]) -> Float[Tensor, ""]:
    """Contrast of two views of the same users with soft targets, at temperature 1 (LLM4CDSR, arXiv 2504.18383).

        S = X Y^T,  T = softmax((X X^T + Y Y^T) / 2)
        mean over rows of  (T . -log softmax(S) + T^T . -log softmax(S^T)) / 2

    What is alike within the views may stay alike across them. Zero for no users.

    >>> soft_contrast(torch.zeros(4, 2), torch.ones(4, 2)).item() == torch.tensor(4.0).log().item()
    True
    """
    if len(x) == 0:
        return x.sum()
    if x.dtype == torch.bfloat16 or y.dtype == torch.bfloat16:
        x, y = x.float(), y.float()
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ y.T
        alike = ((x @ x.T + y @ y.T) / 2).softmax(dim=1)
    of_x = -(alike * logits.log_softmax(dim=1)).sum(dim=1)
    of_y = -(alike.T * logits.T.log_softmax(dim=1)).sum(dim=1)
    return (of_x + of_y).mean() / 2


def mean_per_user(sequence: Int[Tensor, " queries"], batch_size: int) -> Float[Tensor, " queries"]:
    """Weights that average a user's queries first and the users of the batch afterwards.

    >>> mean_per_user(torch.tensor([0, 0, 2]), 4)
    tensor([0.1250, 0.1250, 0.2500])
    """
    counts = torch.bincount(sequence, minlength=batch_size)
    return 1.0 / (counts[sequence] * batch_size)


def next_item_losses(
    states: tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]],
    batch: Batch,
    negatives: Int[Tensor, "*groups negatives"],
    item: nn.Embedding,
    *,
    num_items_a: int,
    objective: str,
    temperature: float,
    spared: tuple[Tensor | None, Tensor | None],
) -> dict[str, Tensor]:
    """Losses `"a"` and `"b"` of states against the negatives of their own domain, as `objective` says.

    Binary cross-entropy (`"published"`) or InfoNCE, averaged over a user's targets first, then over users.
    `spared` is what `Recommender.spared` returns.
    """
    losses = {}
    for number, (state, queries, own) in enumerate(zip(states, batch.queries, spared, strict=True)):
        # every group has as many of a domain as the next
        mine = negatives[(negatives > num_items_a) == bool(number)].view(*negatives.shape[:-1], -1)
        positive, negative = shared_logits(state, queries.targets, item(queries.targets), mine, item(mine), own)
        weight = mean_per_user(queries.sequence, batch.size)
        if objective == "infonce":
            losses["ab"[number]] = info_nce(positive / temperature, negative / temperature, weight)
        else:
            losses["ab"[number]] = binary_cross_entropy(positive, negative, weight)
    return losses
