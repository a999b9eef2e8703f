"""What a config refuses and how it is named; what a profile and a notebook's parameters cell may say."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gcalib.config import READ_BY, Profile, RunConfig, divisors, notebook_parameters, run_id


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": "synthetic", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimm": 12}, "dimm\n.*Extra inputs are not permitted"),
        ({"gate": "relu"}, "gate\n.*'sigmoid', 'tanh', 'constant' or 'none'"),
        ({"model": "bert4rec"}, "model='bert4rec' is unknown; the models are abxi"),
        ({"dropout": 1.0}, "dropout\n.*less than 1"),
        ({"dim": 1}, "dim\n.*greater than or equal to 2"),
        ({"lr": 0}, "lr\n.*greater than 0"),
        ({"lr": float("nan")}, "lr\n"),
        ({"negatives": 1}, "negatives\n"),
        ({"gca": (0, 3)}, r"gca.1\n.*Input should be 0, 1 or 2"),
        ({"gca": None}, "gca\n"),
        ({"gca": [0.5]}, "gca.0\n"),
        ({"gca": "01"}, "gca\n"),
        ({"gca": (0,), "gca_depth": 4}, "gca_depth\n.*less than or equal to 3"),
        ({"gca": (0,), "heads": 5, "dim": 12}, "heads=5 does not divide dim=12; heads may be 1, 2, 3, 4, 6, 12"),
        ({"self_heads": 5, "dim": 12}, "self_heads=5 does not divide dim=12; self_heads may be 1, 2, 3, 4, 6, 12"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_a_config_is_a_value() -> None:
    first = config(gca=(2, 0))
    assert first.gca == (0, 2) and first == config(gca=[0, 2]) and hash(first) == hash(config(gca=[0, 2]))
    assert config(gca=(1, 1)).gca == (1,)
    with pytest.raises(ValidationError, match="frozen"):
        first.dim = 32  # type: ignore[misc]
    assert RunConfig.model_validate_json(first.model_dump_json()) == first


def test_replace_changes_fields_and_checks_them_again() -> None:
    assert config(dim=32).replace(seed=4) == config(dim=32, seed=4)
    with pytest.raises(ValidationError, match="heads=4 does not divide dim=6"):
        config(gca=(0,)).replace(dim=6)
    with pytest.raises(ValidationError, match="Extra inputs"):
        config().replace(sead=1)


def test_options_of_published_code_are_a_set() -> None:
    both = config(published=["pads_as_targets", "official_attention", "pads_as_targets"])
    assert both.published == ("official_attention", "pads_as_targets")


def test_patience_does_not_count_on_a_cosine_schedule() -> None:
    assert config(stop_patience=3, plateau_patience=1).canonical() == config()
    assert config(schedule="plateau", stop_patience=3).canonical().stop_patience == 3


def test_cross_attention_fields_do_not_count_without_it() -> None:
    assert config(gate="tanh", heads=8).canonical() == config()
    assert config(dim=6, heads=5).canonical() == config(dim=6)
    assert config(gca_depth=3, gate_hidden=9, gca_norm=False).canonical() == config()
    with_gca = config(gca=(0,), gate="tanh", heads=8, gca_depth=3, gate_hidden=9, gca_norm=False)
    assert with_gca.canonical() == with_gca
    matched = with_gca.replace(match="params")  # to the size that depth, gate and norm have
    assert matched.canonical() == matched.replace(gate="sigmoid", heads=4)


INTERVENED = {"update": "noise", "evaluation_only": True, "cos_penalty": 0.5}


@pytest.mark.parametrize("fields", [{}, {"gca": (0,), "match": "params"}])
def test_interventions_do_not_count_without_cross_attention(fields: dict[str, object]) -> None:
    assert config(**fields, **INTERVENED).canonical() == config(**fields)
    assert config(gca=(0,), **INTERVENED).canonical() == config(gca=(0,), **INTERVENED)


@pytest.mark.parametrize("update", ["full", "linear", "ffn"])  # the last two have nothing to spare training
def test_evaluation_only_does_not_count_where_training_cannot_differ(update: str) -> None:
    asked = config(gca=(0,), update=update, evaluation_only=True)
    assert asked.canonical() == config(gca=(0,), update=update)


def test_run_ids_stay_what_they_were() -> None:
    """A changed id orphans every stored run: a new field needs a default that keeps what was, and enters nothing."""
    data = "0" * 64
    assert run_id(RunConfig(pair="food-kitchen"), data, 1) == "69dc42a200200ce6"
    stack = RunConfig(pair="x", gca=(2, 0), gate="tanh", heads=8, dim=128, lr=3e-4, seed=4)
    assert run_id(stack, data, 1) == "21893c15c4ab8a8e"
    published = RunConfig(pair="x", gca=[1], published=["official_attention"], hidden=680, dim=256, ties="published")
    assert run_id(published, data, 2) == "b23fecfa2f44e293"


OTHER = {
    "ties": "published", "gca": (0,), "gate": "tanh", "select": "s100", "precision": "bf16", "hidden": 99,
    "text": "random", "latent": 0, "objective": "infonce", "match": "params", "min_per_domain": 0,
    "schedule": "cosine", "published": ("shuffled_batches",), "gate_hidden": 9, "gca_norm": False, "track_test": True,
    "update": "noise", "evaluation_only": True, "cos_penalty": -0.5,
}  # fmt: skip
SPELT = {"pair": "another name", "columns": {"user": "who"}, "shared_ids": "drop"}


@pytest.mark.parametrize("name", [name for name in RunConfig.model_fields if name not in ("model", *SPELT)])
def test_every_field_that_differs_makes_another_run(name: str) -> None:
    base = config(gca=(1,), model=READ_BY.get(name, ("abxi",))[0], schedule="plateau", update="parallel")
    now = getattr(base, name)
    value = OTHER[name] if name in OTHER else now / 2 if isinstance(now, float) else 2 * now + 2 * (now == 0)
    changed = base.replace(**{name: value})
    assert run_id(changed, "data", 1) != run_id(base, "data", 1)
    assert run_id(changed.replace(**{name: now}), "data", 1) == run_id(base, "data", 1)


@pytest.mark.parametrize("name", SPELT)
def test_how_the_data_is_spelt_makes_no_other_run(name: str) -> None:
    """The hash of the data speaks for it."""
    assert run_id(config(**{name: SPELT[name]}), "data", 1) == run_id(config(), "data", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gca", False),
        ("gca", [True]),
        ("heads", True),
        ("seed", False),
        ("lr", True),
        ("hidden", False),
        ("match", False),
    ],
)
def test_truth_values_are_no_numbers(field: str, value: object) -> None:
    """`gca: no` of a YAML file is false, which must not become `gca=(0,)`."""
    with pytest.raises(ValidationError, match=rf"{field}\n.* true and false .in YAML also yes, no, on and off. mean"):
        config(**{field: value})
    with pytest.raises(ValidationError, match="mean nothing here"):
        Profile(profile="x", seeds=[True])


def test_what_a_profile_would_overwrite_or_lose_is_refused(tmp_path: Path) -> None:
    for text, message in {
        "grid: [{variants: [{model: markov}]}]": "a variant may not hold model, pair or seed: use models",
        "settings: {model: sasrec}": "settings may not hold pair, seed or model",
        "settings: {dim: 8}\nsettings: {epochs: 1}": "'settings' is given twice",
        "settings: {dim: 8, dim: 16}": "'dim' is given twice",
    }.items():
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Profile.load("x", tmp_path)


def test_seeds_given_twice_count_once() -> None:
    assert len(Profile(profile="x", seeds=[0, 0, 1]).configs({}, {"gca": (0,)})) == 4


def test_what_another_model_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="latent is read by cdsrnp only, not by abxi: leave it out"):
        config(latent=9)
    with pytest.raises(ValidationError, match="pads_as_targets is read by abxi only, not by cdsrnp"):
        config(model="cdsrnp", published=["pads_as_targets"])
    with pytest.raises(ValidationError, match="needs gca, the cross-attention whose size"):
        config(match="network")


def test_rules_hold_for_their_model_and_pair(tmp_path: Path) -> None:
    """Later rules win over earlier ones and over the settings, and what a notebook asks wins over all."""
    (tmp_path / "p.yaml").write_text(
        "settings: {dim: 16}\nrules:\n- {model: cdsrnp, settings: {dim: 32, latent: 9}}\n"
        "- {pair: food-kitchen, settings: {lr: 0.5}}\n- {model: cdsrnp, pair: food-kitchen, settings: {dim: 64}}\n"
    )
    profile = Profile.load("p", tmp_path)
    assert profile.config().dim == 16 and profile.config().lr != 0.5
    assert profile.config(model="cdsrnp").dim == 32 and profile.config(model="cdsrnp").latent == 9
    both = profile.config(model="cdsrnp", pair="food-kitchen")
    assert both.dim == 64 and both.lr == 0.5 and both.latent == 9
    assert profile.config(model="cdsrnp", pair="food-kitchen", dim=8).dim == 8
    (tmp_path / "bad.yaml").write_text("rules:\n- {model: abxi, settings: {latent: 9}}\n")
    with pytest.raises(ValueError, match="latent is read by cdsrnp only"):
        Profile.load("bad", tmp_path)


@given(st.integers(1, 400))
def test_divisors_are_all_the_divisors(number: int) -> None:
    listed = [int(n) for n in divisors(number).split(", ")]
    assert listed == sorted(set(listed)) and set(listed) == {n for n in range(1, number + 1) if number / n % 1 == 0}


# ------------------------------------------------------------------------------------------------------- profiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(
        "profile: small\npair: synthetic\nseeds: [3, 5]\nworkers: 2\nsettings: {dim: 16, lr: 0.01}\n"
    )
    (tmp_path / "empty.yaml").write_text("# all defaults\n")
    return tmp_path


def test_a_profile_makes_configs(folder: Path) -> None:
    profile = Profile.load("small", folder)
    assert profile.config() == config(dim=16, lr=0.01, seed=3)
    assert profile.config(dim=8, pair="food-kitchen", seed=9) == RunConfig(pair="food-kitchen", dim=8, lr=0.01, seed=9)
    grid = profile.configs({}, {"gca": (0,)})
    assert [(c.gca, c.seed) for c in grid] == [((), 3), ((), 5), ((0,), 3), ((0,), 5)]
    assert all(c.dim == 16 for c in grid)
    assert Profile.load("empty", folder).config() == config()
    assert Profile.load("small", folder, seeds=[1], store="elsewhere").seeds == (1,)


def test_a_profile_that_does_not_exist_is_answered_with_those_that_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no profile 'smal' in .*; there are empty, small\."):
        Profile.load("smal", folder)
    with pytest.raises(ValueError, match=r"there are none\."):
        Profile.load("small", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes: [1]", r"sedes: .*They may be profile, pair, seeds, store, workers, settings, rules, grid\."),
        ("seeds: []", r"seeds: .*at least 1 item"),
        ("workers: 0", r"workers: .*greater than or equal to 1"),
        ("settings: {dim: -1}", r"dim: .*greater than or equal to 2"),
        ("settings: {gca: null}", r"gca"),
        ("settings: {dimm: 3}", r"dimm: .* dim, hidden,"),
        ("settings: {seed: 3}", r"settings may not hold pair, seed or model"),
        ("- a\n- list", r"Bad parameters|bad\.yaml"),
        ("workers: [", r"bad\.yaml"),
    ],
)
def test_a_bad_profile_is_one_sentence_with_what_is_allowed(folder: Path, text: str, message: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as failed:
        Profile.load("bad", folder)
    assert "\n" not in str(failed.value) and not isinstance(failed.value, ValidationError)


def test_a_grid_lists_every_model_pair_variant_and_seed_once_under_its_rules(folder: Path) -> None:
    (folder / "wide.yaml").write_text(
        """
settings: {dim: 16}
seeds: [0, 1]
rules: [{model: cdsrnp, settings: {objective: infonce}}]
grid:
  - {models: [abxi, cdsrnp], variants: [{}, {gca: [0]}]}
  - {models: [abxi], pairs: [synthetic], variants: [{}, {gate: tanh}, {gca: [1]}], seeds: [0]}
"""
    )
    grid = Profile.load("wide", folder).grid_configs()
    assert len(grid) == len(set(grid)) == 9  # 2 models, 2 variants, 2 seeds; a plain baseline has no gate: one more
    assert {c.objective for c in grid if c.model == "cdsrnp"} == {"infonce"}
    assert {(c.pair, c.dim) for c in grid} == {("synthetic", 16)}
    assert [c.seed for c in grid if c.gca == (1,)] == [0]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{models: [abxi], variants: [{}], extra: 1}", r"grid\.0\.extra"),
        ("{models: [abxi], variants: [{gac: [0]}]}", r"gac"),
        ("{models: [abix], variants: [{}]}", r"'abix' is unknown; the models are abxi"),
        ("{models: [sasrec], variants: [{domain_rank: 3}]}", r"domain_rank is read by abxi only"),
    ],
)
def test_a_bad_grid_is_one_sentence(folder: Path, block: str, message: str) -> None:
    (folder / "bad.yaml").write_text(f"grid: [{block}]")
    with pytest.raises(ValueError, match=message) as failed:
        Profile.load("bad", folder).grid_configs()
    assert "\n" not in str(failed.value) and not isinstance(failed.value, ValidationError)


@pytest.mark.parametrize("path", sorted(Path("params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_of_the_repository_loads_and_serves_as_papermill_parameters(path: Path) -> None:
    profile = Profile.load(path.stem)
    # `papermill -f params/x.yaml` injects the file's keys as variables of the notebook
    assert notebook_parameters(notebook(**yaml.safe_load(path.read_text()))) == profile


# ----------------------------------------------------------------------------------------- the parameters cell


def notebook(**names: object) -> dict[str, object]:
    """A notebook's globals after some imports, as IPython leaves them."""
    return {
        "__name__": "__main__", "_": "", "_i1": "import gcalib", "In": ["", "import gcalib"], "Out": {},
        "exit": object(), "quit": object(), "open": open, "get_ipython": lambda: None,
        "gcalib": types.ModuleType("gcalib"), "Path": Path, "notebook_parameters": notebook_parameters, **names,
    }  # fmt: skip


def test_a_parameters_cell_lies_on_top_of_its_profile(folder: Path) -> None:
    profile = notebook_parameters(notebook(profile="small", seeds=[8], workers=None), folder)
    assert (profile.profile, profile.seeds, profile.workers, profile.settings["dim"]) == ("small", (8,), 2, 16)
    assert profile.store == str(folder.parent / "results")  # beside params/, wherever the kernel was started


def test_a_misspelt_or_missing_parameter_stops_the_notebook(folder: Path) -> None:
    with pytest.raises(ValueError, match="worker: .*They may be profile, pair, seeds, store, workers"):
        notebook_parameters(notebook(profile="small", worker=1), folder)
    with pytest.raises(ValueError, match="workers: "):
        notebook_parameters(notebook(profile="small", workers="many"), folder)
    with pytest.raises(ValueError, match="must set profile, the name of a file in params/"):
        notebook_parameters(notebook(pair="synthetic"), folder)
    with pytest.raises(ValueError, match=r"seeds: Input should be a list, such as \[0, 1\]"):
        notebook_parameters(notebook(profile="small", seeds="[0, 1]"), folder)  # papermill's -p hands over a string


def test_a_kernel_in_which_the_notebook_ran_says_to_restart(folder: Path) -> None:
    names = notebook(profile="small")
    names["settings"] = notebook_parameters(names, folder)
    names |= {"sequence": [1, 2], "nA": 3}  # what later cells left behind
    with pytest.raises(ValueError, match="run all cells in a new kernel") as caught:
        notebook_parameters(names, folder)
    assert "nA" not in str(caught.value)


def test_profiles_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert notebook_parameters(notebook(profile="smoke")).profile == "smoke"
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").write_text("pair: synthetic\n")
    assert notebook_parameters(notebook(profile="mine")).pair == "synthetic"
