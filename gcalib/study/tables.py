"""Run records as the tables that statistics and figures read: variants by their names, domains in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gcalib.store import load_curves
from gcalib.study import statistics

NAMES = {
    "abxi": "ABXI", "llm4cdsr": "LLM4CDSR", "cdsrnp": "CDSRNP", "sasrec": "SASRec, one domain",
    "sasrec-mixed": "SASRec, mixed", "popularity": "popularity", "markov": "Markov chain", "item-knn": "item-KNN",
}  # fmt: skip

BASELINES = [NAMES[name] for name in ("abxi", "llm4cdsr", "cdsrnp")]
"""The models that the paper's claims are about."""

PROTOCOL = {"ABXI": "s999", "LLM4CDSR": "s100", "CDSRNP": "s999"}
"""The paper's candidates: so many sampled items beside the right one, as in the baselines' own papers."""


def published(name: str) -> pd.DataFrame:
    """Figures of others, with `model` spelt as in `NAMES`.

    - "claims", of the paper (arXiv 2510.09435): `claim`, `model`, `pair`, `domain`, `question` (as of
      `gcalib.study.claims`), `figure` (of an effect, in percent), `text`, and where the claim is the figure itself the
      range `low` to `high` that replicates it. Nan is any model, pair or domain.
    - "figure2", "figure3", points of the figures in its first author's public post, read off: `abs_cos` (|mean cos|, to
      0.005) and `ndcg10` (to 0.001) of a `model` and `domain`, without points that others hide; `ndcg10` against
      `params_millions` (to 0.02, embeddings included) of a `case`, `domain` and `arm` (baseline, early, stack).
    - "published", of official programs, on test events: `source`, `model`, `pair`, `candidates`, `domain` (a or b),
      `metric`, `mean`, `sd` over `runs` seeds.
    """
    table = pd.read_csv(Path(__file__).with_name(f"{name}.csv"))
    return table.assign(model=table["model"].replace(NAMES))


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """Records with columns that name them for a reader: `model` as its paper spells it, `case` (model and pair) and
    `variant`: "plain", "GCA0+1", "GCA0 ×2" (two modules in succession), "GCA0, tanh", "GCA0, small gate", ...

    "matched (all parameters)" is the plain model widened to the size of GCA0, "matched (network)" to its size without
    embedding tables, and "matched to GCA0+1 (all parameters)" to that of another variant.
    """
    models = runs["model"].map(NAMES)
    fields = ["gca", "gca_depth", "gate_hidden", "gca_norm", "gate", "heads", "match"]
    variants = [_variant(*row) for row in zip(*(runs[name] for name in fields), strict=True)]
    for name, (text, latent, options) in enumerate(zip(runs["text"], runs["latent"], runs["published"], strict=True)):
        variants[name] += ", random text" * (text == "random") + ", no latent" * (latent == 0)
        variants[name] += ", official attention" * ("official_attention" in options)
    return runs.assign(model=models, variant=variants, case=models + " · " + runs["pair"])


def _variant(
    gca: Sequence[int], depth: int, gate_hidden: float | None, norm: bool, gate: str, heads: int, match: object
) -> str:
    if not len(gca):
        return "plain"
    name = "GCA" + "+".join(map(str, gca)) + (f" ×{depth}" if depth > 1 else "")
    name += ", small gate" * pd.notna(gate_hidden) + ", no norm" * (not norm)
    if isinstance(match, str):  # else None, or nan where pandas has put it
        return f"matched{f' to {name}' * (name != 'GCA0')} ({'all parameters' if match == 'params' else match})"
    return name + f", {gate}" * (gate != "sigmoid") + f", {heads} heads" * (heads != 4)


def of_width(runs: pd.DataFrame, dim: int | None = None) -> pd.DataFrame:
    """The runs of one width d; None is the largest of each model. Ranking depends on it, and chance level of cosine."""
    return runs[runs["dim"] == (dim or runs.groupby("model")["dim"].transform("max"))]


def by_domain(runs: pd.DataFrame, figures: Mapping[str, str], split: str = "test") -> pd.DataFrame:
    """Records with one row a run and domain: what belongs to no split, `domain` ("A", "B"), `protocol`, some figures.

    `figures` maps a new column to the name that a figure has within a domain, such as `{"ndcg": "full.ndcg@10"}`. In
    "paper.ndcg@10" the candidates are `protocol`: the model's `PROTOCOL`, and "full" for other models and where items
    are too few. `split` is "val", "test" or "best_test", the best over the epochs.
    """
    kept = runs[[name for name in runs if not str(name).startswith(("test.", "val.", "best_test."))]]
    protocol = runs["model"].map(PROTOCOL).fillna("full")
    for name in set(protocol) - {"full"}:
        lacking = runs[f"test.a.{name}.mrr"].isna() if f"test.a.{name}.mrr" in runs else True
        protocol = protocol.mask((protocol == name) & lacking, "full")
    parts = []
    for letter in "ab":
        for candidates in protocol.unique().tolist() or ["full"]:  # no runs are a table, too
            part = runs[protocol == candidates]
            names = {
                new: f"{split}.{letter}.{one}".replace(".paper.", f".{candidates}.") for new, one in figures.items()
            }
            found = {new: part[name].astype(float) for new, name in names.items()}
            where = {"domain": letter.upper(), "protocol": candidates}
            parts.append(kept[protocol == candidates].assign(**where, **found))
    return pd.concat(parts, ignore_index=True)


def counts(runs: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Number of finished seeds of each model, pair and width, a column for each of some variants."""
    cells = pd.crosstab([runs["model"], runs["pair"], runs["dim"]], runs["variant"])
    return cells.reindex(columns=list(variants), fill_value=0).rename_axis(columns=None)


def side_by_side(
    effects: Mapping[str, pd.DataFrame], keys: Sequence[str] = ("model", "pair", "domain")
) -> pd.DataFrame:
    """Tables of `statistics` beside each other as texts, a column each; rows are told apart by `keys`."""
    texts = {
        name: frame.assign(text=[statistics.as_text(*row) for row in frame[["mean", "low", "high"]].to_numpy()])
        for name, frame in effects.items()
    }
    return pd.DataFrame({name: frame.set_index(list(keys))["text"] for name, frame in texts.items()}).fillna("")


def curves(runs: pd.DataFrame, store: str, metric: str) -> pd.DataFrame:
    """A validation metric over the epochs, a row for each run and domain: `model`, `pair`, `case`, `variant`, `dim`,
    `seed`, `domain`, `epoch`, `value`.
    """
    names = ["run_id", "model", "pair", "case", "variant", "dim", "seed"]
    columns = {f"val.{letter}.{metric}": letter.upper() for letter in "ab"}
    rows = load_curves(store, runs["run_id"].tolist()).reindex(columns=["run_id", "epoch", *columns])
    rows = rows.melt(["run_id", "epoch"], var_name="domain").replace({"domain": columns}).astype({"value": float})
    return rows.dropna(subset=["value"]).merge(runs[names], on="run_id")


def alignment(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run, domain, insertion point (`point`) and module there (`number`, from 1) that the run has.

    As `by_domain`, with all measures of `gcalib.alignment.cosine` by their names (nan if lacking) and NDCG@10
    by the paper's protocol as `ndcg`. Plain and parameter-matched runs have no rows.
    """
    measured, parts = runs[[not isinstance(match, str) for match in runs["match"]]], []
    for point, number in [(point, number) for point in (0, 1, 2) for number in (1, 2, 3)]:
        place = f"gca{point}_{number}." if number > 1 else f"gca{point}."
        measures = [name.partition(place)[2] for name in map(str, runs) if name.startswith(f"test.a.{place}")]
        figures = {"ndcg": "paper.ndcg@10", **{name: f"{place}{name}" for name in measures}}
        depths = zip(measured["gca"], measured["gca_depth"], strict=True)
        mine = measured[[point in points and number <= depth for points, depth in depths]]
        if len(mine):
            parts.append(by_domain(mine, figures).assign(point=point, number=number))
    none = runs[:0].assign(**dict.fromkeys(("domain", "protocol", "point", "number", "ndcg")))
    return pd.concat(parts or [none], ignore_index=True)


def selection(runs: pd.DataFrame, metric: str = "paper.ndcg@10") -> pd.DataFrame:
    """What it is worth, in percent, to pick the epoch on test: the best test figure over the epochs against that of the
    epoch that validation picked. Rows of `statistics.log_ratio` for plain and GCA0, named by `chosen`; of runs with
    `track_test`.
    """
    shown = runs[runs["variant"].isin(["plain", "GCA0"])].rename(columns={"variant": "chosen"})
    parts = [by_domain(shown, {"value": metric}, split).assign(variant=split) for split in ("test", "best_test")]
    long = pd.concat(part.dropna(subset=["value"]) for part in parts)
    return statistics.log_ratio(long, "value", "test", by=["model", "dim", "chosen"])


def sizes(runs: pd.DataFrame, metric: str = "paper.ndcg@10") -> pd.DataFrame:
    """A metric against all parameters (`params_total`), for curves as in the paper's Figure 3, by size.

    Rows of `statistics.mean_interval` for each `case`, `domain`, `dim` and `variant`. There are three kinds of `arm`:
    "baseline" (plain, or widened to the size of another), "early" (one to three modules at point 0) and "stack".
    """
    kinds = {r"plain|matched.*\(all parameters\)": "baseline", "GCA0( ×.)?": "early", r"GCA\d(\+\d)+": "stack"}
    shown = pd.concat(runs[runs["variant"].str.fullmatch(kind)].assign(arm=arm) for kind, arm in kinds.items())
    cell = ["case", "model", "pair", "domain", "dim", "arm", "variant", "params_total"]
    table = statistics.mean_interval(by_domain(shown, {"value": metric}), "value", cell)
    return table.sort_values(["case", "domain", "dim", "params_total"], ignore_index=True)


def saved(by_size: pd.DataFrame, draws: int = 4000) -> pd.DataFrame:
    """Parameters that cross-attention saves at equal quality: the size at which the baseline has it, less its own.

    The baseline is a line over log size through its best so far, and the size infinite where none of the study will do.
    For the interval, means are drawn as they may be over seeds, mean + s / sqrt(n) t.

    Returned are the rows "early" and "stack" of `sizes` with two seeds or more, where the baseline has two such sizes,
    with `saved`, `low`, `high` (parameters; negative where a smaller baseline is as good).
    """
    rows, rng = [], np.random.default_rng(0)
    for _, part in by_size[by_size["n"] > 1].groupby(["case", "domain", "dim"], sort=False):
        curve, others = part[part["arm"] == "baseline"], part[part["arm"] != "baseline"]
        size = np.log(curve["params_total"])
        for row in others.to_dict("records") if len(curve) > 1 else ():
            means = []
            for each in map(np.asarray, [*curve["each"], row["each"]]):
                likely = np.r_[0, rng.standard_t(len(each) - 1, draws)]  # the first is the mean itself
                means.append(each.mean() + each.std(ddof=1) / np.sqrt(len(each)) * likely)
            best = np.maximum.accumulate(means[:-1]).T  # (draws, sizes)
            places = [np.interp(y, x, size, right=np.inf) for x, y in zip(best, means[-1], strict=True)]
            found = np.exp(places) - row["params_total"]
            low, high = np.quantile(found[1:], [0.025, 0.975], method="inverted_cdf")
            rows.append({**row, "saved": found[0], "low": low, "high": high})
    return pd.DataFrame(rows, columns=[*by_size, "saved"]).drop(columns=["n", "mean", "p", "each"])
