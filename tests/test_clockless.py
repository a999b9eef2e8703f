"""Batches of pairs without a common clock, by hand and against the evaluation form; runs on such a pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib import yardsticks
from gcalib.config import RunConfig
from gcalib.data.batches import make_batch
from gcalib.data.pair import Pair
from gcalib.evaluation import evaluate, score
from gcalib.experiments import run
from gcalib.models import build_model
from gcalib.models.crossing import touched, untouched
from gcalib.ranking import metrics

NUM_A, NUM_B = 40, 45
SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(1, NUM_A), max_size=8), st.lists(st.integers(NUM_A + 1, NUM_A + NUM_B), max_size=8)),
    min_size=1,
    max_size=4,
).filter(lambda users: all(len(a) + len(b) for a, b in users))


def test_a_batch_by_hand() -> None:
    """Users with 3 + 2, 1 + 0 and 1 + 3 events."""
    sequences = [np.array([1, 2, 3, 51, 52]), np.array([4]), np.array([5, 53, 54, 55])]
    batch = make_batch(sequences, NUM_A, window=5, training=True, clock=False, users=np.array([7, 8, 9]))
    a, b = batch.own
    assert (
        a.items.tolist() == [1, 2, 4, 5] and a.sequence.tolist() == [0, 0, 1, 2] and a.position.tolist() == [2, 1, 1, 1]
    )
    assert b.items.tolist() == [51, 53, 54] and b.sequence.tolist() == [0, 2, 2] and b.position.tolist() == [1, 2, 1]
    assert batch.queries[0].targets.tolist() == [2, 3] and batch.queries[0].own_row.tolist() == [0, 1]
    assert batch.queries[1].targets.tolist() == [52, 54, 55] and batch.queries[1].own_row.tolist() == [0, 1, 2]
    assert batch.queries[0].last.tolist() == [1] and batch.queries[1].last.tolist() == [0, 2]
    assert batch.mixed.items.tolist() == [] and batch.rows == 7 and batch.users.tolist() == [7, 8, 9]
    asked = make_batch(sequences, NUM_A, window=2, training=False, clock=False)
    assert asked.own[0].items.tolist() == [2, 3, 4, 5] and asked.own[1].items.tolist() == [51, 52, 54, 55]
    assert asked.queries[0].own_row.tolist() == [1, 2, 3] and asked.queries[1].own_row.tolist() == [1, -1, 3]
    assert asked.queries[1].newest().own_row.tolist() == [1, -1, 3] and asked.queries[1].sequence.tolist() == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(1, 9))
def test_training_rows_are_the_evaluation_rows_of_what_comes_before_the_last_events(
    users: list[tuple[list[int], list[int]]], window: int
) -> None:
    whole = [np.array(a + b, dtype=np.int64) for a, b in users]
    shorter = [np.array((a[:-1] if len(a) > 1 else a) + (b[:-1] if len(b) > 1 else b)) for a, b in users]
    training = make_batch(whole, NUM_A, window=window, training=True, clock=False)
    evaluation = make_batch(shorter, NUM_A, window=window, training=False, clock=False)
    for domain in (0, 1):
        first, second = training.own[domain], evaluation.own[domain]
        for name in ("items", "sequence", "position", "seen", "slot"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        queries = training.queries[domain]
        targets = [user[domain][-window - 1 :][1:] for user in users]
        assert queries.targets.tolist() == sum(targets, [])
        rows = first.items[queries.own_row].tolist()
        assert rows == sum((user[domain][-window - 1 :][:-1] for user in users), [])
        assert queries.targets[queries.last].tolist() == [row[-1] for row in targets if row]


def test_an_untouched_row_is_seen_by_all_and_a_touched_one_by_none() -> None:
    batch = make_batch([np.array([1, 2, 3, 51, 52, 53])], NUM_A, window=5, training=True, clock=False)
    for clocks, seen in ((untouched, True), (touched, False)):
        a, b = (clocks(stream) for stream in batch.own)
        for keys, queries in ((a, b), (b, a)):
            assert ((keys.key_time.unsqueeze(1) < queries.query_time) == seen).all()


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 event each; got lengths \[1, 0\]"):
        make_batch([np.array([1]), np.array([], dtype=np.int64)], NUM_A, window=5, training=False, clock=False)


def per_domain(users: int = 40) -> Pair:
    rng = np.random.default_rng(0)
    rows, lengths = [], []
    for user in range(users):
        a, b = rng.integers(2, 9, 2) if user % 5 else (5, 0)
        rows.append(np.concatenate([rng.permutation(NUM_A)[:a] + 1, rng.permutation(NUM_B)[:b] + 1 + NUM_A]))
        lengths.append(a + b)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Pair(
        "split", ("a", "b"), np.concatenate(rows), np.full(offsets[-1], -1), offsets, (NUM_A, NUM_B), False, "shuffle"
    )


@pytest.mark.parametrize("model", ["sasrec", "cdsrnp"])
def test_evaluation_agrees_with_ranking_score_one_target_at_a_time(model: str) -> None:
    pair = per_domain()
    torch.manual_seed(1)
    built = build_model(RunConfig(pair="split", model=model, dim=8, negatives=20), pair)
    with torch.no_grad():
        built.item.weight.mul_(20)
    found, split = evaluate(built, pair, "test", protocols=("full",)), pair.split("test")
    reciprocal: dict[int, list[float]] = {0: [], 1: []}
    for user, target in zip(split.users, split.targets, strict=True):
        scores, domain = score(built, pair, [split.history(user)])[0], int(target > NUM_A)
        others = np.setdiff1d(np.arange(1, 1 + NUM_A) + domain * NUM_A, pair.sequence(user))
        others = others if domain == 0 else np.setdiff1d(np.arange(1 + NUM_A, 1 + NUM_A + NUM_B), pair.sequence(user))
        ties = (scores[others] == scores[target]).sum() / 2
        reciprocal[domain].append(1 / (1 + (scores[others] > scores[target]).sum() + ties))
    for domain, letter in enumerate("ab"):
        assert found[f"{letter}.full.mrr"] == pytest.approx(np.mean(reciprocal[domain]), rel=1e-6)
        assert found[f"{letter}.targets"] == len(reciprocal[domain]) > 10


@pytest.mark.parametrize("name", ["popularity", "markov", "item-knn"])
def test_yardsticks_rank_alike_as_models_and_as_scorers(name: str) -> None:
    pair = per_domain()
    found = evaluate(build_model(RunConfig(pair="split", model=name), pair), pair, "test", device=torch.device("cpu"))
    for domain, letter in enumerate("ab"):
        scorer = getattr(yardsticks, name.replace("-", "_"))(pair, domain)
        ranks = metrics(*yardsticks.ranks(pair, scorer, domain))
        assert {metric: found[f"{letter}.full.{metric}"] for metric in ranks} == pytest.approx(ranks, rel=1e-6)


def test_a_run_without_a_clock_says_so_and_other_models_refuse(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    pair = per_domain()
    lines = [
        f"u{user} " + " ".join(f"{item}|-1" for item in pair.sequence(user)) for user in range(40) if pair.in_both[user]
    ]
    (tmp_path / "shop" / "events.txt").write_text("\n".join(lines) + "\n")
    names = ", ".join(f'"i{n}": [{n}, {int(n > NUM_A)}]' for n in range(1, 1 + NUM_A + NUM_B))
    (tmp_path / "shop" / "map_item.json").write_text("{" + names + "}")
    fields = {"pair": str(tmp_path / "shop"), "dim": 8, "heads": 2, "epochs": 2, "negatives": 20}
    record = run(RunConfig(model="cdsrnp", gca=(0,), support=6, **fields), tmp_path / "store")
    assert record["clock"] is False and record["support_users"] == 6 and len(record["support_sha256"]) == 64
    assert 0 < record["test.a.full.mrr"] <= 1 and 0 < record["test.b.gca0.cos_mean_abs"] < 1
    for model in ("abxi", "sasrec-mixed"):
        with pytest.raises(ValueError, match="needs one stream of both domains in time order"):
            run(RunConfig(model=model, **fields), tmp_path / "store")
