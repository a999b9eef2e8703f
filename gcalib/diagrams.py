"""The models as pictures: boxes from the input below to the scores above, cross-attention in colour.

`diagram("abxi")` draws one model. A box spans some of the columns (streams) of its model and stands on a level; every
box passes on to the boxes above it that share a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from gcalib.rendering import GREY, INK

KINDS = {"data": "#e9e9e9", "layer": "#cfe3f2", "cross-attention": "#f6cfb5", "score": "#cdeadf"}
COLUMN, LEVEL, GAP = 250, 62, 26  # pixels: width of a column, distance of levels, between boxes


@dataclass(frozen=True)
class Box:
    """One part of a model: what it says, its columns `[left, right)`, its level, and what kind it is."""

    text: str
    left: float
    right: float
    level: int
    kind: str = "layer"


def _crossing(point: int, level: int, left: float = 1, right: float = 3) -> Box:
    names = {0: "GCA0, early", 1: "GCA1, mid", 2: "GCA2, late"}
    return Box(f"{names[point]}: A reads B, B reads A", left, right, level, "cross-attention")


DIAGRAMS: dict[str, tuple[str, list[Box]]] = {
    "abxi": (
        "ABXI: three streams share one encoder, an invariant projection joins them",
        [
            Box("mixed sequence", 0, 1, 0, "data"),
            Box("events of A", 1, 2, 0, "data"),
            Box("events of B", 2, 3, 0, "data"),
            Box("one item table + positions", 0, 3, 1),
            _crossing(0, 2),
            Box("shared causal self-attention, post-norm", 0, 3, 3),
            Box("shared SwiGLU + LoRA x", 0, 1, 4),
            Box("shared SwiGLU + LoRA a", 1, 2, 4),
            Box("shared SwiGLU + LoRA b", 2, 3, 4),
            _crossing(1, 5),
            Box("invariant projection", 0, 1, 6),
            Box("own projection A", 1, 2, 6),
            Box("own projection B", 2, 3, 6),
            Box("state A = invariant + own A,  state B = invariant + own B", 0, 3, 7),
            _crossing(2, 8),
            Box("state A · items of A", 1, 2, 9, "score"),
            Box("state B · items of B", 2, 3, 9, "score"),
        ],
    ),
    "llm4cdsr": (
        "LLM4CDSR: a mixed stream of item texts beside one of learned items a domain",
        [
            Box("titles of the mixed sequence", 0, 1, 0, "data"),
            Box("events of A", 1, 2, 0, "data"),
            Box("events of B", 2, 3, 0, "data"),
            Box("frozen encoder + adapter", 0, 1, 1),
            Box("items of A, from the texts' PCA", 1, 2, 1),
            Box("items of B, from the texts' PCA", 2, 3, 1),
            _crossing(0, 2),
            Box("SASRec, mixed", 0, 1, 3),
            Box("SASRec, A", 1, 2, 3),
            Box("SASRec, B", 2, 3, 3),
            _crossing(1, 4),
            _crossing(2, 5),
            Box("state A = [mixed ; A],  state B = [mixed ; B]", 0, 3, 6),
            Box("state A · [text ; item] of A", 1, 2, 7, "score"),
            Box("state B · [text ; item] of B", 2, 3, 7, "score"),
        ],
    ),
    "cdsrnp": (
        "CDSRNP: what other users do across domains, as a latent z that bends the decoder",
        [
            Box("support users (+ batch, in training)", 0, 1, 0, "data"),
            Box("events of A", 1, 2, 0, "data"),
            Box("events of B", 2, 3, 0, "data"),
            Box("their items + positions", 0, 1, 1),
            Box("items of A + positions", 1, 2, 1),
            Box("items of B + positions", 2, 3, 1),
            _crossing(0, 2),
            Box("same encoders, GCA0 and GCA1", 0, 1, 3),
            Box("self-attention, A", 1, 2, 3),
            Box("self-attention, B", 2, 3, 3),
            Box("triples [state A ; state B ; target]", 0, 1, 4),
            _crossing(1, 4),
            Box("MLP, mean over users, z ~ N(·)", 0, 1, 5),
            Box("interest-adaptive decoder: states of A and of B, given z", 0, 3, 6),
            _crossing(2, 7),
            Box("state A · items of A", 1, 2, 8, "score"),
            Box("state B · items of B", 2, 3, 8, "score"),
        ],
    ),
}


def diagram(model: str) -> Any:
    """A model of the package as boxes and arrows.

    Raises
    ------
    ValueError
        For a model without a diagram; the message lists those that have one.
    """
    if model not in DIAGRAMS:
        raise ValueError(f"There is no diagram of {model!r}; there are {', '.join(DIAGRAMS)}.")
    title, boxes = DIAGRAMS[model]
    rows = [
        {
            "text": box.text, "kind": box.kind, "x": box.left * COLUMN + GAP / 2, "x2": box.right * COLUMN - GAP / 2,
            "y": box.level * LEVEL, "y2": box.level * LEVEL + LEVEL - GAP,
            "middle": (box.left + box.right) * COLUMN / 2, "centre": box.level * LEVEL + (LEVEL - GAP) / 2,
        }
        for box in boxes
    ]  # fmt: skip
    width, height = COLUMN * max(box.right for box in boxes), LEVEL * (1 + max(box.level for box in boxes)) - GAP
    across = alt.Scale(domain=[0, width], nice=False)
    upward = alt.Scale(domain=[0, height], nice=False)
    shown = alt.Chart(pd.DataFrame(rows)).encode(
        alt.X("x:Q", axis=None, scale=across), alt.Y("y:Q", axis=None, scale=upward)
    )
    colours = alt.Scale(domain=list(KINDS), range=list(KINDS.values()))
    fills = shown.mark_rect(cornerRadius=5).encode(
        x2="x2:Q", y2="y2:Q", color=alt.Color("kind:N", title=None, scale=colours, legend=alt.Legend(orient="bottom"))
    )
    words = shown.mark_text(fontSize=13, color=INK).encode(
        alt.X("middle:Q", axis=None, scale=across), alt.Y("centre:Q", axis=None, scale=upward), text="text:N"
    )
    flow = alt.Chart(pd.DataFrame(_arrows(boxes))).encode(alt.X("x:Q", axis=None, scale=across))
    lines = flow.mark_rule(color=GREY).encode(alt.Y("y:Q", axis=None, scale=upward), y2="y2:Q")
    heads = flow.mark_point(shape="triangle-up", color=GREY, size=45, opacity=1).encode(
        alt.Y("y2:Q", axis=None, scale=upward)
    )
    # large letters on four fills need no more, and a notebook shows several of these
    small = {"scale": 1, "palette": 32}
    chart = alt.layer(lines, heads, fills, words).properties(width=width, height=height, usermeta=small)
    return chart.properties(title=alt.TitleParams(title, subtitle="From the input, below, to the scores"))


def _arrows(boxes: list[Box]) -> list[dict[str, float]]:
    """One arrow a column between each box and the next above it there."""
    arrows = []
    for column in range(int(max(box.right for box in boxes))):
        here = sorted((box for box in boxes if box.left <= column < box.right), key=lambda box: box.level)
        for below, above in zip(here, here[1:], strict=False):
            start, stop = below.level * LEVEL + LEVEL - GAP, above.level * LEVEL
            arrows.append({"x": (column + 0.5) * COLUMN, "y": start, "y2": stop - 5})
    return arrows
