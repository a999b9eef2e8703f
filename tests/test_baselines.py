"""Baselines on pairs small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from gcalib.config import RunConfig
from gcalib.data.pair import Pair
from gcalib.evaluation import evaluate, score
from gcalib.models.base import Recommender
from gcalib.models.baselines import counts, similarities, transitions
from gcalib.models.matching import build_model
from gcalib.ranking import metrics
from gcalib.training import fit

NAMES = pytest.mark.parametrize("name", ["popularity", "markov", "item-knn"])


def pair_of(rows: list[list[int]], num_items: tuple[int, int], has_global_order: bool) -> Pair:
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.full(sum(lengths), -1)
    return Pair("tiny", ("a", "b"), np.concatenate(rows), times, offsets, num_items, has_global_order)


# Items 1 to 4 are of A, 5 to 8 of B. Training histories end two events before the end of each row.
PAIR = pair_of([[1, 2, 5, 2, 3], [1, 2, 6, 1, 4], [2, 5, 6, 7, 5]], (4, 4), True)
# Items 1 to 5 are of A, 6 to 10 of B. Training sees 1 2 | 6 7 of user 0, 2 1 | 7 of user 1 and 3 | 6 7 of user 2.
PER_DOMAIN = pair_of([[1, 2, 3, 4, 6, 7, 8, 9], [2, 1, 4, 3, 7, 6, 9], [3, 1, 2, 6, 7, 9, 8]], (5, 5), False)


def model_of(name: str, pair: Pair = PAIR) -> Recommender:
    return build_model(RunConfig(pair="tiny", model=name), pair)


def test_counts_by_hand() -> None:
    assert counts(PAIR).tolist() == [0, 2, 3, 0, 0, 2, 2, 0, 0]


def test_counts_per_domain_by_hand() -> None:
    assert counts(PER_DOMAIN).tolist() == [0, 2, 2, 1, 0, 0, 2, 3, 0, 0, 0]


def test_transitions_by_hand() -> None:
    steps = transitions(PAIR).toarray()
    assert {(i, j): steps[i, j] for i, j in np.argwhere(steps).tolist()} == {(1, 2): 2, (2, 5): 2, (2, 6): 1, (5, 6): 1}


def test_transitions_per_domain_by_hand() -> None:
    steps = transitions(PER_DOMAIN).toarray()
    assert {(i, j): steps[i, j] for i, j in np.argwhere(steps).tolist()} == {(1, 2): 1, (6, 7): 2, (2, 1): 1}


def test_similarities_are_cosines_of_who_bought_what() -> None:
    bought = np.zeros((3, 9))
    for user, items in enumerate([[1, 2, 5], [1, 2, 6], [2, 5, 6]]):
        bought[user, items] = 1
    assert similarities(PAIR).toarray() == pytest.approx(cosine_similarity(bought.T))


def test_similarities_count_an_item_bought_twice_once() -> None:
    twice, once = (pair_of([[1, item, 2, 5, 3, 4], [1, 2, 5, 6]], (4, 4), True) for item in (1, 7))
    found, other = (similarities(pair).toarray()[:6, :6] for pair in (twice, once))
    assert np.array_equal(found, other)


def test_scores_of_popularity() -> None:
    assert score(model_of("popularity"), PAIR, [[1], [6]])[:, 1:].tolist() == [[2, 3, 0, 0, 2, 2, 0, 0]] * 2


def test_scores_of_markov_are_what_followed_the_last_item() -> None:
    found = score(model_of("markov"), PAIR, [[1, 2], [2, 1], [6]])[:, 1:]
    assert found.tolist() == [[0, 0, 0, 0, 2, 1, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0], [0] * 8]


def test_scores_of_markov_per_domain_are_what_followed_the_domain_s_last_item() -> None:
    found = score(model_of("markov", PER_DOMAIN), PER_DOMAIN, [[2, 1, 7, 6], [1, 3]])[:, 1:]
    assert found.tolist() == [[0, 1, 0, 0, 0, 0, 2, 0, 0, 0], [0] * 10]


@pytest.mark.parametrize("pair", [PAIR, PER_DOMAIN], ids=["global", "per-domain"])
def test_scores_of_item_knn_add_up_the_similarities_of_the_history(pair: Pair) -> None:
    table, histories = similarities(pair).toarray(), [[1, 2, 2, 6, 7], [3]]
    wanted = np.array([table[history].sum(axis=0) for history in histories])
    assert score(model_of("item-knn", pair), pair, histories)[:, 1:] == pytest.approx(wanted[:, 1:], rel=1e-6)


def assert_ranks(name: str, pair: Pair, ranks: dict[str, list[float]], sizes: dict[str, list[int]]) -> None:
    """Ranks and numbers of candidates of the test targets of A and of B, in order of the users."""
    found = evaluate(model_of(name, pair), pair, "test", protocols=("full",), alignment=False)
    for domain, wanted in ranks.items():
        assert found[f"{domain}.targets"] == len(wanted)
        for metric, value in metrics(wanted, sizes[domain]).items():
            assert found[f"{domain}.full.{metric}"] == pytest.approx(value, abs=1e-12), (domain, metric)


def test_ranks_of_popularity_by_hand() -> None:
    # 3 of user 0 competes with 4, and 4 of user 1 with 3: all score zero. 5 of user 2 is in the history; it competes
    # nevertheless, with 8.
    assert_ranks("popularity", PAIR, {"a": [1.5, 1.5], "b": [1.0]}, {"a": [2, 2], "b": [2]})


def test_ranks_of_markov_per_domain_by_hand() -> None:
    # A: 4 competes with 5 after 3, 3 with 5 after 4, and 2 with 4 and 5 after 1, which is what followed it
    # B: 9 competes with 10 after 8, 9 with 8 and 10 after 6, and 8 with 10 after 9: nothing followed with 8, 9 or 10
    ranks, sizes = {"a": [1.5, 1.5, 1.0], "b": [1.5, 2.0, 1.5]}, {"a": [2, 2, 3], "b": [2, 3, 2]}
    assert_ranks("markov", PER_DOMAIN, ranks, sizes)


@NAMES
def test_fit_evaluates_only(name: str) -> None:
    done = fit(RunConfig(pair="tiny", model=name), PAIR, device="cpu")
    assert done.best_epoch == 0
    assert [row["epoch"] for row in done.curves] == [0]
    assert "val.a.full.mrr" in done.curves[0]
    assert not list(done.model.parameters())
