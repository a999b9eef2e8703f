"""The pictures of the models: boxes that do not overlap, and an insertion point for each that a model has."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageColor

from gcalib import rendering
from gcalib.diagrams import DIAGRAMS, KINDS, diagram
from gcalib.models import MODELS


@pytest.mark.parametrize("model", DIAGRAMS)
def test_a_diagram_draws_and_nothing_overlaps(model: str) -> None:
    rendering.enable()
    picture, width, _ = rendering.png(diagram(model).to_dict())
    assert picture[:4] == b"\x89PNG" and width > 600
    for one, other in combinations(DIAGRAMS[model][1], 2):
        assert one.level != other.level or one.right <= other.left or other.right <= one.left, (one, other)


@pytest.mark.parametrize("model", DIAGRAMS)
def test_few_colours_are_enough_for_a_diagram(model: str) -> None:
    rendering.enable()
    colours = Image.open(io.BytesIO(rendering.png(diagram(model).to_dict())[0])).convert("RGB").getcolors(32)
    assert colours is not None
    for kind in {box.kind for box in DIAGRAMS[model][1]}:
        away = np.array([colour for _, colour in colours]) - ImageColor.getrgb(KINDS[kind])
        assert np.abs(away).max(axis=1).min() <= 4, kind


@pytest.mark.parametrize("model", sorted(set(MODELS) & set(DIAGRAMS)))
def test_a_diagram_shows_the_insertion_points_that_the_model_has(model: str) -> None:
    shown = {int(box.text[3]) for box in DIAGRAMS[model][1] if box.kind == "cross-attention"}
    assert shown == set(MODELS[model].points)


def test_an_unknown_model_has_no_diagram() -> None:
    with pytest.raises(ValueError, match="no diagram of 'sasrec'; there are abxi, llm4cdsr, cdsrnp"):
        diagram("sasrec")
