"""Gated cross-attention between the two domain streams of a model, in both directions, without a look ahead.

What may attend to what is decided by the rows' clocks (`gcalib.data.batches`): a query sees a row of the other domain
if nothing in that row is newer than the query's slot. A row that no cross-attention has touched depends on `seen`;
one that was itself a query depends on all up to its own `slot`. So a first cross-attention at 0 or 1 sees the other
domain's newest item, and a later one of a stack sees it through what the first made of it. At 2 alone the models
differ: CDSRNP's states still hold one event each, so its late cross-attention sees that item; the states of ABXI and
LLM4CDSR stand for all up to a slot, so theirs does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.attention import GatedCrossAttention, newest_visible
from gcalib.config import RunConfig
from gcalib.data.batches import Queries, Stream
from gcalib.packing import Layout


@dataclass(frozen=True)
class Clocks:
    """What a cross-attention needs to know of one side's rows: a query sees keys with `key_time < query_time`."""

    sequence: Int[Tensor, " rows"]
    key_time: Int[Tensor, " rows"]
    query_time: Int[Tensor, " rows"]
    layout: Layout


def untouched(stream: Stream) -> Clocks:
    """A row that was no query yet depends on its own event: seen at every slot from that one on."""
    return Clocks(stream.sequence, stream.seen, stream.slot + 1, stream.layout)


def touched(stream: Stream) -> Clocks:
    """A row that was a query depends on all up to its slot.

    In training the slots of the two domains differ, each predicting one event; only in evaluation do both domains
    ask at the newest slot. The strict comparison keeps those two from seeing each other, as in training.
    """
    return Clocks(stream.sequence, stream.slot, stream.slot, stream.layout)


def of_queries(queries: Queries, batch_size: int) -> Clocks:
    """States made for queries depend on the user's events up to their slot."""
    return Clocks(queries.sequence, queries.slot, queries.slot, Layout.of(queries.sequence, batch_size))


class Crossings(nn.ModuleDict):
    """The cross-attentions of a model, two for each insertion point of the config (`"0a"`: point 0, query A)."""

    def __init__(self, config: RunConfig, dim: int) -> None:
        super().__init__(
            {f"{point}{s}": GatedCrossAttention(dim, config.heads, config.gate) for point in config.gca for s in "ab"}
        )
        for name, module in self.items():
            module.name = f"{name[1]}.gca{name[0]}"  # type: ignore[assignment]

    def cross(
        self,
        point: int,
        a: Float[Tensor, "rows_a dim"],
        b: Float[Tensor, "rows_b dim"],
        clocks_a: Clocks,
        clocks_b: Clocks,
    ) -> tuple[Float[Tensor, "rows_a dim"], Float[Tensor, "rows_b dim"]]:
        """Cross-attention in both directions, each from what went in."""
        out = []
        for s, x, y, of_x, of_y in (("a", a, b, clocks_a, clocks_b), ("b", b, a, clocks_b, clocks_a)):
            key_time = _padded(of_y.key_time, of_y.layout, fill=2**31)
            query_time = _padded(of_x.query_time, of_x.layout, fill=-1)
            mask = key_time.unsqueeze(1) < query_time.unsqueeze(2)
            partner = newest_visible(y, of_y.layout, mask, of_x.layout)
            gca = self[f"{point}{s}"]
            assert isinstance(gca, GatedCrossAttention)
            out.append(gca.rows(x, y, partner, of_x.layout, of_y.layout, mask, sequence=of_x.sequence))
        return out[0], out[1]


def _padded(values: Int[Tensor, " rows"], layout: Layout, fill: int) -> Int[Tensor, "batch length"]:
    flat = values.new_full((layout.batch * layout.length,), fill)
    return flat.index_copy_(0, layout.index, values).view(layout.batch, layout.length)
