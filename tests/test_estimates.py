"""Estimates of time and memory, from stored runs and without any."""

from __future__ import annotations

import pandas as pd
import pytest

from gcalib.config import RunConfig
from gcalib.estimates import estimate

CONFIG = RunConfig(pair="synthetic:num_users=60,items_a=60,items_b=60", dim=8, heads=2, epochs=10)


def stored(peaks: list[float]) -> pd.DataFrame:
    """Runs of the config that took a second each and had these peaks of memory."""
    outcome = {"epochs_trained": 10, "stopped_early": False, "seconds": 1.0}
    return pd.DataFrame([{**CONFIG.model_dump(), **outcome, "peak_memory_bytes": peak} for peak in peaks])


def test_memory_is_what_nine_in_ten_runs_like_it_stayed_below() -> None:
    peaks = [1e9 + 1e8 * number for number in range(11)]
    found = estimate([CONFIG], stored(peaks))
    assert found["bytes"].item() == pytest.approx(1.9e9) and found["seconds"].item() == pytest.approx(1.0)


def test_a_larger_run_is_expected_to_need_more_than_those_stored() -> None:
    small, large = estimate([CONFIG, CONFIG.but(dim=256, batch_size=2048)], stored([1e9]))["bytes"]
    assert small == pytest.approx(1e9) and large > 1.2e9


def test_without_runs_it_is_guessed() -> None:
    found = estimate([CONFIG], pd.DataFrame())
    assert found["learned_from"].item() == 0 and found["bytes"].item() > 5e8
