"""Scorers without training, on a pair small enough to count by hand; ranks against an independent count."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

import gcalib
from gcalib import load_pair, yardsticks
from gcalib.data.batches import make_batch
from gcalib.data.pair import Pair
from gcalib.ranking import metrics

# Histories for training end two events before the end of each row.
ROWS = [[1, 2, 5, 2, 3], [1, 2, 6, 1, 4], [2, 5, 6, 7, 5]]
TINY = Pair(
    "tiny", ("a", "b"), np.concatenate(ROWS), np.arange(15) * 86_400, np.array([0, 5, 10, 15]), (4, 4), True, "shuffle"
)
ALL = np.arange(3)


def test_training_sees_all_but_two_events():
    assert TINY.items[yardsticks.training_events(TINY)].tolist() == [1, 2, 5, 1, 2, 6, 2, 5, 6]


def test_popularity_counts_training_events():
    assert yardsticks.popularity(TINY, 0)(ALL).tolist() == [[2, 3, 0, 0]] * 3
    assert yardsticks.popularity(TINY, 1)(ALL).tolist() == [[2, 2, 0, 0]] * 3


def test_markov_counts_what_followed_the_last_item():
    # last items 2, 1, 7; training steps 1-2, 2-5, 1-2, 2-6, 2-5, 5-6
    assert yardsticks.markov(TINY, 0)(ALL).tolist() == [[0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert yardsticks.markov(TINY, 1)(ALL).tolist() == [[2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("domain", [0, 1])
def test_item_knn_adds_up_cosines(domain: int) -> None:
    """Against scikit-learn's cosines of the binary user-item matrix of the training histories."""
    bought = np.zeros((3, 9))
    for user, items in enumerate([[1, 2, 5], [1, 2, 6], [2, 5, 6]]):
        bought[user, items] = 1
    cosines = cosine_similarity(bought.T)
    histories = [[1, 2, 5, 2], [1, 2, 6, 1], [2, 5, 6, 7]]  # what precedes the test target, repeats counted again
    wanted = np.array([cosines[history].sum(axis=0) for history in histories])
    assert yardsticks.item_knn(TINY, domain)(ALL) == pytest.approx(wanted[:, 1 + 4 * domain : 5 + 4 * domain])


def test_nearest_id_looks_to_one_side_and_inside_the_domain():
    third = pytest.approx(1 / 3)
    assert yardsticks.nearest_id(TINY, 0, 1)(ALL).tolist() == [[0, 0, 1, 0.5], [0, 1, 0.5, third], [0, 0, 0, 0]]
    assert yardsticks.nearest_id(TINY, 0, -1)(ALL).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert yardsticks.nearest_id(TINY, 1, -1)(ALL).tolist() == [[0] * 4, [0] * 4, [0.5, 1, 0, 0]]


def test_full_ranks_leave_out_what_the_user_has():
    # Target 3 of user 0 competes with 4 alone, and all score zero; so does target 4 of user 1 with 3.
    rank, size = yardsticks.ranks(TINY, yardsticks.popularity(TINY, 0), 0)
    assert rank.tolist() == [1.5, 1.5] and size.tolist() == [2, 2]
    # Target 5 of user 2 is in the history: it competes nevertheless, with 8.
    rank, size = yardsticks.ranks(TINY, yardsticks.popularity(TINY, 1), 1)
    assert rank.tolist() == [1.0] and size.tolist() == [2]


@pytest.mark.parametrize("domain", [0, 1])
def test_ranks_agree_with_counting(domain):
    pair = load_pair("synthetic:num_users=700")
    scorer, test = yardsticks.popularity(pair, domain), pair.split("test")
    users = np.flatnonzero(pair.domain_of(test.targets) == domain)
    full, size = yardsticks.ranks(pair, scorer, domain)
    sampled, of = yardsticks.ranks(pair, scorer, domain, negatives=100)
    assert len(full) == len(sampled) == len(users) and set(of) == {101}
    assert metrics(full, size)["auc"] > 0.6
    first = 1 + domain * pair.num_items[0]
    for place in range(0, len(users), 37):
        user = users[place]
        scores, target = scorer(users[place : place + 1])[0], test.targets[user] - first
        free = np.setdiff1d(np.arange(pair.num_items[domain]), test.history(user) - first)
        assert size[place] == len(free)
        for rank, among in ((full, free), (sampled, np.append(pair.candidates("test", 100)[user] - first, target))):
            better, equal = (scores[among] > scores[target]).sum(), (scores[among] == scores[target]).sum() - 1
            assert rank[place] == 1 + better + equal / 2


# Without a clock, training sees 1 2 | 5 6 of user 0, 2 1 | 6 of user 1 and 3 | 5 6 of user 2.
SPLIT_ROWS = [[1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 4, 3, 6, 5, 8], [3, 1, 2, 5, 6, 8, 7]]
SPLIT = Pair(
    "split", ("a", "b"), np.concatenate(SPLIT_ROWS), np.full(22, -1), np.array([0, 8, 15, 22]), (4, 4), False, "shuffle"
)


def test_without_a_clock_all_is_counted_inside_a_domain():
    assert SPLIT.items[yardsticks.training_events(SPLIT)].tolist() == [1, 2, 5, 6, 2, 1, 6, 3, 5, 6]
    assert yardsticks.popularity(SPLIT, 0)(ALL)[0].tolist() == [2, 2, 1, 0]
    # steps 1-2, 5-6, 2-1, 5-6; the items before the test targets: 3, 4, 1 and 7, 5, 8
    assert yardsticks.markov(SPLIT, 0)(ALL).tolist() == [[0] * 4, [0] * 4, [0, 1, 0, 0]]
    assert yardsticks.markov(SPLIT, 1)(ALL).tolist() == [[0] * 4, [0, 2, 0, 0], [0] * 4]
    assert yardsticks.nearest_id(SPLIT, 0, -1)(ALL)[0].tolist() == [0.5, 1, 0, 0]
    # Targets 4, 3, 2 of A: each user has three items of A already.
    rank, size = yardsticks.ranks(SPLIT, yardsticks.popularity(SPLIT, 0), 0)
    assert size.tolist() == [1, 1, 2] and rank.tolist() == [1, 1, 1]
    # Target 8 of user 0 stands alone, 8 of user 1 loses to no other than 7, 7 of user 2 likewise: 7 and 8 score zero.
    rank, size = yardsticks.ranks(SPLIT, yardsticks.popularity(SPLIT, 1), 1)
    assert size.tolist() == [1, 2, 1] and rank.tolist() == [1, 1.5, 1]


@pytest.mark.parametrize("name", ["popularity", "markov", "item-knn"])
def test_a_yardstick_is_a_model_with_a_record(name, tmp_path):
    """The same ranks through the models' evaluation as by the scorer; nothing is trained."""
    config = gcalib.RunConfig(pair="synthetic:num_users=300", model=name)
    pair = load_pair(config.pair)
    record = gcalib.run(config, tmp_path)
    for domain, letter in enumerate("ab"):
        scorer = getattr(yardsticks, name.replace("-", "_"))(pair, domain)
        found = metrics(*yardsticks.ranks(pair, scorer, domain))
        for metric in ("ndcg@10", "mrr", "auc"):
            assert record[f"test.{letter}.full.{metric}"] == pytest.approx(found[metric], rel=1e-6)
    assert record["params_total"] == record["epochs_trained"] == record["flops_per_step"] == 0
    model = gcalib.build_model(config, pair)
    scores = gcalib.score(model, pair, [pair.sequence(3)[:-1]])
    vectors = [model.item_vectors(domain) for domain in (0, 1)]
    batch = make_batch([pair.sequence(3)[:-1]], pair.num_items[0], window=model.window, training=False)
    for domain, state in enumerate(model(batch)):
        mine = slice(1 + domain * pair.num_items[0], 1 + pair.num_items[0] + domain * pair.num_items[1])
        assert scores[0, mine] == pytest.approx((state @ vectors[domain].T).numpy()[0], rel=1e-5)
