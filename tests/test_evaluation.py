"""Evaluation against an obvious reference, one user at a time; scores and recommendations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gcalib.alignment import cosine
from gcalib.attention import record_activations
from gcalib.config import RunConfig
from gcalib.data.frames import pair_from_frames
from gcalib.data.pair import Pair, SplitName
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate, recommend, score
from gcalib.models.base import Recommender
from gcalib.models.matching import build_model
from gcalib.ranking import expected, metrics

PAIR = synthetic_pair(num_users=80, num_items=(160, 170), seed=5)
NAMED = replace(PAIR, domains=("food", "kitchen"))


def per_domain(pair: Pair) -> Pair:
    """The same events, of each user all of A and then all of B."""
    order = np.lexsort((pair.domain_of(pair.items), pair.owner))
    return replace(pair, items=pair.items[order], times=np.full(len(order), -1), has_global_order=False)


def model_of(pair: Pair = PAIR, **changes: object) -> Recommender:
    """An untrained model that tells items apart, in float64: no processor's rounding moves a rank."""
    torch.manual_seed(1)
    model = build_model(RunConfig(**{"pair": "synthetic", "dim": 8, "heads": 2, "gca": (0,), **changes}), pair).double()
    with torch.no_grad():
        model.item.weight.mul_(20)
    return model.eval()


def scores_of(model: Recommender, pair: Pair, history: np.ndarray) -> np.ndarray:
    """Scores of items 1, 2, ... of both domains for one user."""
    with torch.no_grad():
        states = model(model.collate([history], pair, training=False))
        return torch.cat([model.item_vectors(d) @ states[d][0, 0] for d in (0, 1)]).numpy()


def items_of(pair: Pair, domain: int) -> np.ndarray:
    return 1 + domain * pair.num_items[0] + np.arange(pair.num_items[domain])


def reference_ranks(model: Recommender, pair: Pair, split: SplitName) -> list[tuple[int, int, int, int, int]]:
    """Of each target: its user, its item, its rank and the number of candidates, and its rank among the sampled."""
    parts, sampled, found = pair.split(split), pair.candidates(split, 100), []
    for example, (user, target) in enumerate(zip(parts.users, parts.targets, strict=True)):
        scores = np.append(np.nan, scores_of(model, pair, parts.history(user)))
        domain = int(target > pair.num_items[0])
        others = np.setdiff1d(items_of(pair, domain), pair.sequence(user))
        rank, among = (1 + int((scores[items] > scores[target]).sum()) for items in (others, sampled[example]))
        found.append((int(user), int(target), rank, 1 + len(others), among))
    return found


CASES = pytest.mark.parametrize(
    ("pair", "changes", "split"),
    [
        (PAIR, {}, "test"),
        (PAIR, {"model": "sasrec", "gca": ()}, "val"),
        (per_domain(PAIR), {"model": "cdsrnp"}, "test"),
    ],
    ids=["abxi test", "sasrec val", "cdsrnp per-domain test"],
)


@CASES
def test_evaluate_agrees_with_one_user_at_a_time(pair: Pair, changes: dict[str, object], split: SplitName) -> None:
    model = model_of(pair, **changes)
    found, reference = evaluate(model, pair, split, protocols=("full", "s100")), reference_ranks(model, pair, split)
    trained = set(pair.split("val").history_items.tolist())
    for domain in (0, 1):
        mine = [row for row in reference if (row[1] > pair.num_items[0]) == domain]
        seen = [row for row in mine if row[1] in trained]
        ranks, sizes = [row[2] for row in mine], [row[3] for row in mine]
        wanted = {"targets": len(mine), "targets_unseen": len(mine) - len(seen)}
        for name, values in {
            "full": metrics(ranks, sizes),
            "full_seen": metrics([row[2] for row in seen], [row[3] for row in seen]),
            "s100": metrics([row[4] for row in mine], 101),
            "s100_expected": expected(ranks, sizes, 100),
        }.items():
            wanted |= {f"{name}.{metric}": value for metric, value in values.items()}
        letter = "ab"[domain]
        ranked = {key: value for key, value in found.items() if key.startswith(f"{letter}.") and ".gca" not in key}
        assert ranked == pytest.approx({f"{letter}.{key}": value for key, value in wanted.items()}, rel=1e-12)


def test_evaluate_measures_alignment_over_all_real_rows() -> None:
    model, parts = model_of(), PAIR.split("val")
    found = evaluate(model, PAIR, "val", protocols=())
    rows: dict[str, list[tuple[int, float]]] = {"a.gca0": [], "b.gca0": []}
    for user in range(PAIR.num_users):
        with torch.no_grad(), record_activations(model) as recorded:
            model(model.collate([parts.history(user)], PAIR, training=False))
        for one in recorded:
            if (one.x_prime[one.mask] != 0).any():
                measured = cosine(one.x, one.x_prime, one.mask)
                rows[one.name].append((int(measured["rows"]), measured["cos_mean_abs"]))
    for name, of_users in rows.items():
        counts, values = np.array(of_users).T
        assert found[f"{name}.rows"] == counts.sum()
        assert found[f"{name}.cos_mean_abs"] == pytest.approx(np.average(values, weights=counts), rel=1e-9)


def test_evaluate_ranks_nothing_without_protocols() -> None:
    assert all(".gca0." in key for key in evaluate(model_of(), PAIR, "val", protocols=()))


def test_evaluate_without_alignment_measures_none() -> None:
    found = evaluate(model_of(), PAIR, "val", protocols=("full",), alignment=False)
    assert found
    assert not any(".gca" in key for key in found)


def test_evaluate_leaves_out_a_protocol_with_too_few_items() -> None:
    found = evaluate(model_of(), PAIR, "val", alignment=False)  # a domain has 160 items
    assert any(".s100." in key for key in found)
    assert not any("s999" in key for key in found)


def test_evaluate_leaves_out_who_has_every_item_and_counts_them() -> None:
    """The target has nothing to be ranked against; that of the others is ranked as ever."""
    a = pd.DataFrame({"user": list("pqrspq"), "item": list("xxxyyy"), "timestamp": [9, 9, 9, 9, 8, 8]})
    b = pd.DataFrame([(user, f"b{n}", n) for user in "pqrs" for n in range(4)], columns=a.columns)
    pair = pair_from_frames(a, b, min_per_domain=1)
    model = build_model(RunConfig(pair="synthetic", model="popularity"), pair)
    found = evaluate(model, pair, "test")
    assert (found["a.targets"], found["a.targets_without_other_items"]) == (2, 2)
    assert found["b.targets"] == 0
    assert 0 < found["a.full.mrr"] <= 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_and_score_leave_the_model_s_mode_alone(training: bool) -> None:
    model = model_of().train(training)
    evaluate(model, PAIR, "val", protocols=("full",))
    score(model, PAIR, [[1]])
    assert model.training == training


def test_evaluate_sampled_figures_lie_about_their_expected_means() -> None:
    """The kept draw's figure is one of those that the expected one averages; the AUC among all is that average."""
    pair = synthetic_pair(num_users=400, num_items=(300, 300), seed=3)
    found = evaluate(model_of(pair), pair, "test", protocols=("s100",), alignment=False)
    for domain in "ab":
        mean, targets = found[f"{domain}.s100_expected.hr@20"], found[f"{domain}.targets"]
        widest = (mean * (1 - mean) / targets) ** 0.5  # that targets differ makes the draws' spread smaller
        assert 0 < abs(found[f"{domain}.s100.hr@20"] - mean) < 4 * widest
        assert found[f"{domain}.full.hr@20"] < mean < 1
        assert found[f"{domain}.s100_expected.auc"] == pytest.approx(found[f"{domain}.full.auc"], rel=1e-12)


# ----------------------------------------------------------------------------------------- scores, recommendations


@pytest.mark.parametrize(
    ("pair", "changes"), [(PAIR, {}), (per_domain(PAIR), {"model": "sasrec", "gca": ()})], ids=["abxi", "per-domain"]
)
def test_score_is_that_of_each_history_alone(pair: Pair, changes: dict[str, object]) -> None:
    model, histories = model_of(pair, **changes), [np.array([1, 2, 170]), np.array([300]), np.arange(1, 161)]
    scores = score(model, pair, histories)
    assert scores.shape == (3, 331)
    assert scores.dtype == np.float32
    assert np.isneginf(scores[:, 0]).all()
    for row, history in zip(scores, histories, strict=True):
        assert row[1:] == pytest.approx(scores_of(model, pair, history), rel=1e-5, abs=1e-5)


def test_score_reads_the_newest_events_of_a_long_history() -> None:
    model, history = model_of(max_length=13), np.arange(1, 31)
    assert score(model, PAIR, [history]) == pytest.approx(score(model, PAIR, [history[-10:]]))


def test_score_of_no_history_is_empty() -> None:
    assert score(model_of(), PAIR, []).shape == (0, 331)


@pytest.mark.parametrize("history", [[], ["a7", "b3"], [1.0, 2.0], [True], [[1, 2]], 3], ids=str)
def test_score_refuses_what_is_no_list_of_ids(history: object) -> None:
    with pytest.raises(ValueError, match=r"History 1 must be a list of item ids \(integers\), at least one"):
        score(model_of(), PAIR, [[1, 2], history])


@pytest.mark.parametrize("item", [0, -1, 331])
def test_score_refuses_unknown_ids(item: int) -> None:
    with pytest.raises(ValueError, match=r"History 0 holds an item id outside 1\.\.330, the items of synthetic"):
        score(model_of(), PAIR, [[item, 3]])


@pytest.mark.parametrize(("domain", "number"), [("A", 0), ("B", 1), ("food", 0), ("kitchen", 1)])
def test_recommend_gives_the_best_new_items_of_the_domain(domain: str, number: int) -> None:
    model, histories = model_of(NAMED), [np.array([1, 2, 170, 171]), np.array([300, 5])]
    table = recommend(model, NAMED, histories, domain=domain, k=7)
    scores = score(model, NAMED, histories)
    for row, history in enumerate(histories):
        mine = table[table["history"] == row]
        new = np.setdiff1d(items_of(NAMED, number), history)
        best = new[np.argsort(-scores[row, new])][:7]
        assert mine["item"].tolist() == best.tolist()
        assert mine["rank"].tolist() == list(range(1, 8))
        assert mine["score"].tolist() == scores[row, best].tolist()


def test_recommend_names_the_items() -> None:
    assert PAIR.item_names is not None
    assert PAIR.titles is not None
    table = recommend(model_of(), PAIR, [[1, 2, 170]], k=3)
    assert table.columns.tolist() == ["history", "rank", "item", "name", "title", "score"]
    assert table["name"].tolist() == [PAIR.item_names[item - 1] for item in table["item"]]
    assert table["title"].tolist() == [PAIR.titles.by_name[name] for name in table["name"]]


def test_recommend_leaves_an_unknown_title_empty() -> None:
    assert PAIR.titles is not None
    titles = replace(PAIR.titles, by_name={"a7": "Plum jam"})
    table = recommend(model_of(), replace(PAIR, titles=titles), [[1]], k=159)
    assert table.loc[table["title"] != "", ["name", "title"]].to_numpy().tolist() == [["a7", "Plum jam"]]


def test_recommend_without_names_and_titles_gives_numbers() -> None:
    table = recommend(model_of(), replace(PAIR, item_names=None, titles=None), [[1, 2, 170]], k=3)
    assert table.columns.tolist() == ["history", "rank", "item", "name", "score"]
    assert table["name"].tolist() == [str(item) for item in table["item"]]


def test_recommend_has_fewer_rows_where_the_history_has_the_rest() -> None:
    table = recommend(model_of(), PAIR, [np.arange(1, 159), [1]], domain="A", k=160)
    assert sorted(table.loc[table["history"] == 0, "item"]) == [159, 160]
    assert (table["history"] == 1).sum() == 159


def test_recommend_refuses_an_unknown_domain() -> None:
    with pytest.raises(ValueError, match=r"domain='books' is unknown; synthetic has A \(food\) and B \(kitchen\)"):
        recommend(model_of(NAMED), NAMED, [[1]], domain="books")


@pytest.mark.parametrize("k", [0, 171])
def test_recommend_refuses_a_k_beyond_the_domain(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be 1 to 170, the items of kitchen"):
        recommend(model_of(NAMED), NAMED, [[1]], domain="B", k=k)
