"""What every model offers to training and evaluation, and cross-attention between its two domain streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.attention import GatedCrossAttention, visible
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream, collate, items_of
from gcalib.data.pair import Pair
from gcalib.models.losses import binary_cross_entropy, draw_negatives, info_nce, mean_per_user, shared_logits

States = tuple[Float[Tensor, "B l_A dim"], Float[Tensor, "B l_B dim"]]


class Recommender(nn.Module, ABC):
    """A model of users' next items in two domains, A (0) and B (1).

    A subclass makes its layers, `forward`, and, if its loss is not the shared one, `loss`.

    Attributes
    ----------
    points
        The insertion points of gated cross-attention that the model has, and where they are.
    needs_global_order
        Whether it needs the order of events across the two domains.
    trained
        False for a baseline without parameters: `fit` only evaluates it.
    num_items
        Items of A and of B; ids 1..nA are A's, nA+1..nA+nB are B's, 0 is padding.
    window
        Events of a history that the model looks at, the newest ones.
    keep_last_item, recency_in_domain
        How its batches are made (`gcalib.data.batches.collate`).
    item
        Table (1 + nA + nB, d) of the items' embeddings.
    """

    points: ClassVar[dict[int, str]] = {}
    needs_global_order: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    infonce: bool  # else binary cross-entropy
    negatives_of_both: bool = False  # a prediction is held against negatives of both domains, not only of its own
    keep_last_item: bool = False
    recency_in_domain: bool = False
    item: nn.Embedding

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.window = config.max_length - 3  # what leave-one-out and the shift to targets leave
        self.infonce = config.objective == "infonce"

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        """A fresh model for a pair; a model that reads more of the pair than its sizes overrides this."""
        return cls(config, pair.num_items)

    def collate(
        self, histories: Sequence[np.ndarray], pair: Pair, *, training: bool, users: np.ndarray | None = None
    ) -> Batch:
        """A batch as the model reads it (`gcalib.data.batches.collate`)."""
        return collate(
            histories, self.num_items[0], window=self.window, training=training, users=users,
            keep_last_item=self.keep_last_item, recency_in_domain=self.recency_in_domain,
            global_order=pair.has_global_order,
        )  # fmt: skip

    def embedded(self, *streams: Stream) -> tuple[Float[Tensor, "B L dim"], ...]:
        """Item embeddings of streams, by one lookup: each costs a gradient as large as the table."""
        items = torch.cat([stream.items for stream in streams], dim=1)
        return self.item(items).split([stream.items.size(1) for stream in streams], dim=1)

    @abstractmethod
    def forward(self, batch: Batch) -> States:
        """States that predict an item of A and of B: in training at every row of the domain's stream (B, l, d), of
        which those count that `predicts`; in evaluation at each user's newest row (B, 1, d).
        """

    def item_vectors(self, domain: int) -> Float[Tensor, "items dim"]:
        """Vectors of a domain's items, in order of id: the score of an item is its dot product with a state."""
        return self.item.weight[items_of(self.num_items, domain)]

    def scorer(self, domain: int) -> Callable[[Tensor], Tensor]:
        """A function from states (users, d) to the scores of a domain's items (users, items), for many batches."""
        vectors = self.item_vectors(domain)
        return lambda states: states @ vectors.T

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """Losses by name, to be added up: `"a"` and `"b"`, those of the domains, and what else a model has."""
        return self.next_item_losses(self(batch), batch, negatives)

    def next_item_losses(
        self, states: States, batch: Batch, negatives: Int[Tensor, "pools negatives"]
    ) -> dict[str, Tensor]:
        """Losses `"a"` and `"b"` of states: InfoNCE or binary cross-entropy, averaged over users (`user_weights`)."""
        pools = [negatives]
        if not self.negatives_of_both:  # every pool has as many negatives of a domain as the next
            in_b = negatives > self.num_items[0]
            pools = [negatives[in_b == bool(domain)].view(len(negatives), -1) for domain in (0, 1)]
        targets = [stream.targets[stream.predicts] for stream in batch.domains]
        # one lookup: each costs a gradient as large as the table
        named = [*targets, *(ids.flatten() for ids in pools)]
        of_a, of_b, *of_pools = self.item(torch.cat(named)).split([len(ids) for ids in named])
        losses = {}
        for domain, (h, stream, ids, vectors) in enumerate(
            zip(states, batch.domains, targets, (of_a, of_b), strict=True)
        ):
            mine = 0 if self.negatives_of_both else domain
            user = stream.predicts.nonzero()[:, 0]
            positive, negative = shared_logits(
                h[stream.predicts], ids, vectors, pools[mine], of_pools[mine].view(*pools[mine].shape, -1),
                self.excluded(batch, user),
            )  # fmt: skip
            weight = self.user_weights(batch, stream, user)
            if self.infonce:
                temperature = self.config.temperature
                losses["ab"[domain]] = info_nce(positive / temperature, negative / temperature, weight)
            else:
                losses["ab"[domain]] = binary_cross_entropy(positive, negative, weight)
        return losses

    def user_weights(self, batch: Batch, stream: Stream, user: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Weight of each prediction of a stream in its loss: a mean over the user's, then over the batch's users."""
        return mean_per_user(user, batch.size)

    def negatives(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """What `loss` gets as negatives: item ids (pools, negatives), a row for each part of the batch.

        More pools cost no more products, and many more items get a gradient at each step.
        """
        pools = range(self.config.negative_pools)
        return torch.stack([draw_negatives(rng, self.num_items, self.config.negatives) for _ in pools])

    def excluded(self, batch: Batch, user: Int[Tensor, " N"]) -> Int[Tensor, "N items"] | None:
        """The items that are no negatives of each prediction, beside its target: with the option, the user's own."""
        return batch.history_items[user] if "exclude_history_negatives" in self.config.published else None

    @property
    def hidden(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.config.hidden or self.config.dim

    def facts(self) -> dict[str, Any]:
        """What a record has to say of this model beside its config: columns by name."""
        return {}


EARLY, MID, LATE = 0, 1, 2  # insertion points


class CrossDomainAttention(nn.ModuleDict):
    """The gated cross-attentions of a model, two for each insertion point (`"0a"`: point 0, queries of A).

    With `gca_depth` more follow at the same point (`"0a_2"`, `"0a_3"`). With `update="other-user"` the rows of Y are
    those of the next user in the batch.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.points, self.depth = config.gca, config.gca_depth
        self.other_user, self.evaluation_only = config.update == "other-user", config.evaluation_only
        for point in config.gca:
            for number in range(1, self.depth + 1):
                for s in "ab":
                    module = GatedCrossAttention(
                        config.dim, config.heads, config.gate, gate_hidden=config.gate_hidden, norm=config.gca_norm,
                        update=config.update, evaluation_only=config.evaluation_only,
                    )  # fmt: skip
                    suffix = f"_{number}" if number > 1 else ""
                    module.name = f"{s}.gca{point}{suffix}"
                    self[f"{point}{s}{suffix}"] = module

    def forward(self, point: int, h: States, batch: Batch, *, of_predictions: bool = False) -> States:
        """`(GCA(a, b), GCA(b, a))` at an insertion point of the model; elsewhere, and at pads, `h` unchanged.

        A row before any cross-attention depends on events up to its `position`, a row after one on events up to its
        `query_position`. So a first cross-attention at 0 or 1 sees the other domain's newest item, and a later one of
        a stack sees it through what the first made of it. The strict comparison of two updated rows hides the newest
        ones from each other in evaluation, as the targets do in training.

        Parameters
        ----------
        of_predictions
            The rows are the states of predictions, each of which depends on all events up to its `query_position`.
        """
        for number in range(1, self.depth + 1) if point in self.points else ():
            updated = of_predictions or point != min(self.points) or number > 1
            suffix, out = f"_{number}" if number > 1 else "", []
            for s, x, y, of_x, of_y in (("a", *h, *batch.domains), ("b", *h[::-1], *batch.domains[::-1])):
                rows, keys = (of_x.predicts, of_y.predicts) if of_predictions else (of_x.mask, of_y.mask)
                newest = of_y.query_position + 1 if updated else of_y.position
                if self.other_user and not (self.training and self.evaluation_only):
                    y, keys, newest = (t.roll(-1, 0) for t in (y, keys, newest))
                mask = visible(of_x.query_position, newest)
                updated_x = self[f"{point}{s}{suffix}"](x, y, query_mask=rows, key_mask=keys, mask=mask)
                out.append(torch.where(rows.unsqueeze(2), updated_x, x))
            h = out[0], out[1]
        return h


def start_small(module: nn.Module) -> None:
    """Initialise a linear layer or an embedding table of a transformer, for `nn.Module.apply`.

    Tables are small, as the official Xavier start of a large table is: from N(0, 1 / d) training takes several times
    the epochs.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        module.weight.data[0].zero_()
