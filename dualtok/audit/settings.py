"""Settings of the audit."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dualtok.audit.attacks.base import ATTACKS
from dualtok.audit.attacks.registry import default_attacks, names_of, require_attacks
from dualtok.audit.signals.reruns import RerunSettings
from dualtok.errors import did_you_mean

ATTACKER = "attack_reference"
"""Name of the attacker's reference where there is one alone."""


@dataclass(config=ConfigDict(extra="forbid"))
class TextSource:
    """Documents to audit that were not prepared; the tokenizer is the audited model's own."""

    source: str
    """A file of text, JSON, CSV or Parquet, a folder of them, or the name of a ``datasets`` dataset, as for
    ``data.source``."""

    field: str = "text"
    """Key or column that holds the text; .txt files have none."""

    txt_documents: Literal["file", "paragraph"] = "file"
    """Whether a .txt file is one document, or each of its paragraphs (separated by blank lines) is one."""

    dataset_config: str | None = None
    """Configuration of a ``datasets`` dataset."""

    dataset_split: str = "train"
    """Split of a ``datasets`` dataset to stream."""


@dataclass(config=ConfigDict(extra="forbid"))
class ReferenceRecipe:
    """How a reference of the attacker's is trained (``train:FILE``) in an audit without the sections ``train``: with
    AdamW, a constant rate and the plain loss."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the texts; as many as the audited model made. Unit: passes."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate. Unit: none."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Blocks per optimizer step. Unit: blocks."""


@dataclass(config=ConfigDict(extra="forbid"))
class AuditConfig:
    """Which attacks are run on which documents, and how their figures are stated."""

    models: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row of the report -> folder or hub name of a Hugging Face model, e.g. ``{dual: models/dual, base:
    models/base}``."""

    trust_remote_code: bool = False
    """Run Python code that the audited models bring, with all your rights. Read it first."""

    attack_reference: str | dict[str, str] | None = None
    """The attacker's reference model, trained on ``attack_reference``, which shares no document with anything the
    defender used; or several, each with a name: the attacks are run with each, and the strongest over all counts.
    ``train:FILE`` trains one from the base on the texts of a file. Without it the attacks that compare with a reference
    are not run."""

    reference_recipe: ReferenceRecipe = dataclasses.field(default_factory=ReferenceRecipe)
    """How ``train:FILE`` trains; a run's own sections ``model`` and ``train`` take its place."""

    base: str | None = None
    """The model before fine-tuning, a folder or hub name. It serves as the attacker's reference where
    ``attack_reference`` is not given. For members and non-members that are texts alone."""

    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    """Row of ``models`` -> folder or hub name of a peft adapter that is added to its weights."""

    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> ``output_dir`` of training runs whose selection and evaluations over time the report shows."""

    members: str | TextSource = "train"
    """Split that the audited models were trained on; or texts, e.g. ``{source: seen.jsonl}``, which are not prepared,
    split or deduplicated: then ``data`` can be left out."""

    non_members: str | TextSource = "held_out"
    """Split that no model has seen and no choice was made on; or texts, if ``members`` are."""

    block_length: Annotated[int, Field(ge=2)] | None = None
    """For texts alone: a longer text is cut into pieces of so many tokens. Without it the models' context decides, up
    to 4096. Unit: tokens."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass that gives the signals."""

    deepspeed: str | None = None
    """DeepSpeed JSON file of a ZeRO-3 forward-only engine, for models too large for one device. Without it each rank
    holds the whole model."""

    attacks: tuple[str, ...] = default_attacks()
    """Attacks to run, of :data:`.attacks.base.ATTACKS`. ``ref``, ``wbc``, ``error_zone``, ``ht_mia``, ``rmia``, and
    those that know the defence (``ref_distance`` to ``ref_forest``) need the attacker's reference model; ``dc_pdd``
    counts tokens in the split ``attack_reference``, or ``reference`` if there is none. Not run unless named:
    ``info_rmia``, which needs each model and the attacker's reference together, and ``lowercase``, ``recall``,
    ``con_recall``, ``neighborhood`` and ``gradient_norm``, which run each model again. ``shadows`` adds ``lira``,
    ``lira_offline`` and ``shadow_classifier``, and allows ``lt_mia``, which must be named; the last two need the
    attacker's reference model, too."""

    reruns: RerunSettings = dataclasses.field(default_factory=RerunSettings)
    """Settings of the attacks that run each model again."""

    shadows: Annotated[int, Field(ge=2)] | None = None
    """Shadow models for ``lira``, ``lira_offline``, ``shadow_classifier`` and ``lt_mia``, an even number: each is a
    training run like that of the sections ``model``, ``train``, ``objective`` and ``reference``, on its own half of
    members and non-members. Unit: models."""

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

    extract: Annotated[int, Field(ge=1)] | None = None
    """Members, and non-members, whose beginnings each model is made to continue by greedy decoding; drawn with
    ``seed``. None is continued unless this is given: every token costs a pass of the model. Unit: documents."""

    extract_prefix: Annotated[int, Field(ge=1)] = 50
    """Tokens of each document that ``extract`` gives the model. Unit: tokens."""

    extract_tokens: Annotated[int, Field(ge=1)] = 50
    """Tokens in a row that must come back word for word to count as extracted, and that ``extract`` lets the model
    write. Unit: tokens."""

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
        both = next((name for name in (ATTACKER, *self.references) if name in self.models), None)
        if both is not None:
            raise ValueError(f"audit.models: {both!r} is the name of the attacker's model; use another name")
        self._check_classes()
        if self.null_model is not None and self.null_model not in self.models:
            raise ValueError(f"audit.null_model: {self.null_model!r} is none of audit.models")
        require_attacks(self.attacks)
        self._check_shadows()
        self._check_extract()
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

    @property
    def references(self) -> dict[str, str]:
        """Name -> folder, hub name or ``train:FILE`` of each of the attacker's references, the first at first."""
        given = self.attack_reference or self.base
        return {} if given is None else {ATTACKER: given} if isinstance(given, str) else dict(given)

    @property
    def of_texts(self) -> bool:
        """Whether members and non-members are texts, and not splits of prepared data."""
        return isinstance(self.members, TextSource)

    @property
    def splits(self) -> tuple[str, str]:
        """The splits of members and of non-members.

        Raises:
            ValueError: they are texts; a job of :mod:`dualtok.commands.audit.text_jobs` has splits.
        """
        if not isinstance(self.members, str) or not isinstance(self.non_members, str):
            raise ValueError("audit.members: texts, which have no split yet")
        return self.members, self.non_members

    @property
    def sides_in_words(self) -> tuple[str, str]:
        """Where members and non-members are from, e.g. "split train" or "texts of seen.jsonl"."""
        sides = self.members, self.non_members
        members, others = (f"split {own}" if isinstance(own, str) else f"texts of {own.source}" for own in sides)
        return members, others

    def _check_classes(self) -> None:
        """Refuse a class compared with itself, a split with texts, and settings of the one kind with the other."""
        if self.members == self.non_members:
            raise ValueError(f"audit.members: {self.members!r} is also audit.non_members; choose two")
        if self.of_texts != isinstance(self.non_members, TextSource):
            raise ValueError("audit.members, audit.non_members: give two splits, or two sources of texts")
        for name in ("base", "block_length"):
            if getattr(self, name) is not None and not self.of_texts:
                raise ValueError(f"audit.{name}: only where audit.members names texts; remove it")
        if self.of_texts and self.shadows is not None:
            raise ValueError(
                "audit.shadows: shadow models are trained on prepared data; prepare it with `dualtok prepare`, and "
                "name its splits as audit.members and audit.non_members"
            )
        for name in self.adapters:
            if name not in self.models:
                raise ValueError(f"audit.adapters: {name!r} is none of audit.models{did_you_mean(name, self.models)}")

    def _check_extract(self) -> None:
        """Refuse settings without effect, and continuations of models of which no rank holds the whole."""
        if self.extract is None and self.extract_prefix != 50:
            raise ValueError("audit.extract_prefix: has no effect without audit.extract; remove it")
        if self.extract is not None and self.deepspeed is not None:
            raise ValueError(
                "audit.extract: greedy decoding needs the whole model on every rank, which audit.deepspeed shards; "
                "leave one of them out (extraction from the ranks of one forward pass is reported in any case)"
            )

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
            self.attacks = (*self.attacks, *(name for name in names_of("shadows") if not ATTACKS[name].on_demand))
