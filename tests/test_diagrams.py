"""The pictures of the models: boxes that do not overlap, and an insertion point for each that a model has."""

from __future__ import annotations

from itertools import combinations

import pytest

from gcalib import rendering
from gcalib.diagrams import DIAGRAMS, diagram
from gcalib.models import MODELS


@pytest.mark.parametrize("model", DIAGRAMS)
def test_a_diagram_draws_and_nothing_overlaps(model: str) -> None:
    rendering.enable()
    picture, width, _ = rendering.png(diagram(model).to_dict())
    assert picture[:4] == b"\x89PNG" and width > 600
    for one, other in combinations(DIAGRAMS[model][1], 2):
        assert one.level != other.level or one.right <= other.left or other.right <= one.left, (one, other)


@pytest.mark.parametrize("model", sorted(set(MODELS) & set(DIAGRAMS)))
def test_a_diagram_shows_the_insertion_points_that_the_model_has(model: str) -> None:
    shown = {int(box.text[3]) for box in DIAGRAMS[model][1] if box.kind == "cross-attention"}
    assert shown == set(MODELS[model].points)


def test_an_unknown_model_has_no_diagram() -> None:
    with pytest.raises(ValueError, match="no diagram of 'sasrec'; there are abxi, llm4cdsr, cdsrnp"):
        diagram("sasrec")
