"""Settings of the audit."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.attacks.registry import default_attacks, names_of, require_attacks
from dualtok.audit.signals.reruns import RerunSettings


@dataclass(config=ConfigDict(extra="forbid"))
class AuditConfig:
    """Which attacks are run on which documents, and how their figures are stated."""

    models: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row of the report -> folder or hub name of a Hugging Face model, e.g. ``{dual: models/dual, base:
    models/base}``."""

    trust_remote_code: bool = False
    """Run Python code that the audited models bring, with all your rights. Read it first."""

    attack_reference: str | None = None
    """The attacker's reference model, trained on ``attack_reference``, which shares no document with anything the
    defender used. Without it the attacks that compare with a reference are not run."""

    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> ``output_dir`` of training runs whose selection and evaluations over time the report shows."""

    members: str = "train"
    """Split that the audited models were trained on."""

    non_members: str = "held_out"
    """Split that no model has seen and no choice was made on."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass that gives the signals."""

    deepspeed: str | None = None
    """DeepSpeed JSON file of a ZeRO-3 forward-only engine, for models too large for one device. Without it each rank
    holds the whole model."""

    attacks: tuple[str, ...] = default_attacks()
    """Attacks to run, of :data:`.attacks.base.ATTACKS`. ``ref``, ``wbc``, ``error_zone``, and those that know the
    defence (``ref_distance`` to ``ref_forest``) need the attacker's reference model; ``dc_pdd`` counts tokens in the
    split ``attack_reference``, or ``reference`` if there is none. Not run unless named: ``info_rmia``, which needs
    each model and the attacker's reference together, and ``lowercase``, ``recall``, ``con_recall``,
    ``neighborhood`` and ``gradient_norm``, which run each model again. ``shadows`` adds ``lira`` and
    ``lira_offline``."""

    reruns: RerunSettings = dataclasses.field(default_factory=RerunSettings)
    """Settings of the attacks that run each model again."""

    shadows: Annotated[int, Field(ge=2)] | None = None
    """Shadow models for the attacks ``lira`` and ``lira_offline``, an even number: each is a training run like that of
    the sections ``model``, ``train``, ``objective`` and ``reference``, on its own half of members and non-members.
    Unit: models."""

    shadow_checkpoint: Literal["best", "latest"] = "best"
    """Checkpoint of each shadow that is run: the one that was exported of the audited models."""

    collections: tuple[Annotated[int, Field(ge=2)], ...] = (10, 50, 500)
    """Sizes of the collections that are tested as a whole; those that there are too few documents for are left out.
    Unit: documents."""

    permutations: Annotated[int, Field(ge=99)] = 999
    """Permutations of the membership labels behind the p-value of the strongest attack, and random groups behind that
    of the worst group. Unit: permutations."""

    group_field: str | None = None
    """Field that says whose a document is, e.g. ``person``: the audit then also attacks all documents of a group
    together and names the worst group. Prepared data needs it as ``data.group_field``, too."""

    min_group_documents: Annotated[int, Field(ge=2)] = 2
    """Groups with fewer audited documents are left out of the figures by group, and counted. Unit: documents."""

    show_group_names: bool = False
    """Name groups in the report as in the data. By default it has hashes of the names, which are personal data."""

    null_model: str | None = None
    """Key of a model in ``models`` that has seen no member, e.g. ``base``: attacks must find nothing in it, or the
    audit warns that members and non-members differ by themselves."""

    canary_candidates: Annotated[int, Field(ge=20)] = 100
    """Other secrets that each canary's own is ranked among, drawn at random where the space is larger; the models read
    all of them. Unit: secrets."""

    canary_guesses: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.25, 0.5, 1.0)
    """Shares of the canaries whose coins are guessed for the lower bound on epsilon; the best bound is corrected for
    their number, so that a single one, chosen in advance, is sharper. Unit: share, 0 to 1."""

    canary_delta: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    """Delta of the bound that is stated beside that of delta = 0. Unit: probability."""

    bootstrap_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples of the documents behind every interval. Below about 1000 the ends of a 95 % interval move
    visibly with the seed. Unit: resamples."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of every interval. Unit: probability."""

    fpr_targets: list[Annotated[float, Field(gt=0, lt=1)]] = dataclasses.field(
        default_factory=lambda: [0.1, 0.01, 0.001]
    )
    """False-positive rates at which the true-positive rate is given; a rate below one non-member is printed as n/a.
    Unit: rate, 0 to 1."""

    min_k_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a document's least likely tokens that Min-K%, Min-K%++ and SURP look at; Shi et al. 2024 found 0.2
    best."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the bootstrap, of the choice of documents, and of prefixes and neighbors. Unit: none."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Blocks per forward pass and rank. Unit: blocks."""

    max_documents: Annotated[int, Field(ge=2)] | None = None
    """At most this many members and this many non-members, drawn at random with ``seed``; null takes all. Unit:
    documents."""

    def __post_init__(self) -> None:
        """Refuse empty and repeated lists, and a class compared with itself."""
        if "attack_reference" in self.models:
            raise ValueError("audit.models: 'attack_reference' is the name of the attacker's model; use another name")
        if self.members == self.non_members:
            raise ValueError(f"audit.members: {self.members!r} is also audit.non_members; choose two splits")
        if self.null_model is not None and self.null_model not in self.models:
            raise ValueError(f"audit.null_model: {self.null_model!r} is none of audit.models")
        require_attacks(self.attacks)
        self._check_shadows()
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise ValueError("audit.attacks: name at least one attack, and each only once")
        for field in dataclasses.fields(RerunSettings):
            using = [name for name, made in ATTACKS.items() if field.name in made.settings]
            if getattr(self.reruns, field.name) != field.default and not set(using) & set(self.attacks):
                raise ValueError(
                    f"audit.reruns.{field.name}: has no effect without {' or '.join(using)} in audit.attacks"
                )
        self._check_groups()
        if not self.canary_guesses:
            raise ValueError("audit.canary_guesses: give at least one share of the canaries")
        if not self.fpr_targets or len(set(self.fpr_targets)) < len(self.fpr_targets):
            raise ValueError("audit.fpr_targets: give at least one rate, and each only once")

    def _check_groups(self) -> None:
        """Refuse settings of groups without a field."""
        for name, default in (("min_group_documents", 2), ("show_group_names", False)):
            if self.group_field is None and getattr(self, name) != default:
                raise ValueError(f"audit.{name}: has no effect without audit.group_field; remove it")

    def _check_shadows(self) -> None:
        """Refuse odd numbers and settings without effect, and let the shadows' attacks join the others."""
        needing = [name for name in self.attacks if ATTACKS[name].kind == "shadows"]
        if self.shadows is None:
            if needing:
                raise ValueError(f"audit.attacks: {needing[0]!r} needs shadow models; give audit.shadows")
            if self.shadow_checkpoint != "best":
                raise ValueError("audit.shadow_checkpoint: has no effect without audit.shadows; remove it")
            return
        if self.shadows % 2:
            raise ValueError(
                f"audit.shadows: {self.shadows} is odd; every document is in one half of the shadows, so give an even "
                "number, e.g. 16"
            )
        if not needing:
            self.attacks = (*self.attacks, *names_of("shadows"))
