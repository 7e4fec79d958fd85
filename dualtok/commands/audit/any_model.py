"""An audit as a function: of a model in memory or in a folder, on two lists of texts, for notebooks and callbacks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from dualtok.audit.attacks.registry import default_attacks
from dualtok.audit.report.data import AuditReport
from dualtok.audit.report.page import render_html
from dualtok.audit.report.write import csv_rows
from dualtok.audit.settings import ATTACKER, AuditConfig
from dualtok.audit.signals.from_logits import token_signals
from dualtok.commands.audit.attack import Seen, attack_all
from dualtok.commands.audit.groups import document_groups
from dualtok.commands.audit.passes.model_signals import ModelPasses
from dualtok.commands.audit.text_jobs import LONGEST_BLOCK, MEMBERS, NON_MEMBERS
from dualtok.data.text_lists import TextList, pack_texts
from dualtok.data.tokenizer import load_tokenizer
from dualtok.distributed.ranks import Ranks
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.load import load_causal_lm
from dualtok.model.losses import SignalModel, check_batch, require_faithful
from dualtok.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dualtok.audit.report.data import AuditFigures, ModelAudit
    from dualtok.audit.signals.signals import Signals
    from dualtok.data.folder import DataFolder

PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


@dataclass(frozen=True)
class AuditResult:
    """What an audit of one model found."""

    figures: AuditFigures
    """All figures, as ``dualtok audit`` writes them into ``audit.json``."""

    @property
    def model(self) -> ModelAudit:
        """The model's figures."""
        return self.figures.models[0]

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful; empty if nothing does."""
        return [] if self.figures.checks is None else self.figures.checks.warnings

    @cached_property
    def attacks(self) -> pd.DataFrame:
        """One row per attack: AUC as published and two-sided, with intervals, and TPR at each false-positive rate."""
        rows = []
        for attack in self.model.attacks:
            row: dict[str, Any] = {"attack": attack.label}
            for name, estimate in (("auc", attack.auc), ("auc_two_sided", attack.auc_two_sided)):
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            for rate in attack.tpr:
                row[f"tpr_at_{rate.target_fpr:g}"] = None if rate.tpr is None else rate.tpr.value
            rows.append(row)
        return pd.DataFrame(rows).set_index("attack")

    @cached_property
    def table(self) -> pd.DataFrame:
        """Every figure, one per row: the lines of ``report.csv``."""
        return pd.DataFrame(csv_rows(self.report))

    @cached_property
    def report(self) -> AuditReport:
        """The report, as ``dualtok report`` makes it."""
        return AuditReport(
            title="dualtok audit",
            created=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
            identity={"members": "a list of texts", "non-members": "a list of texts"},
            settings=self.figures.settings,
            rows=self.figures.models,
            checks=self.figures.checks,
            references=self.figures.references,
            versions=installed_versions(PACKAGES),
        )

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one HTML page, and write it if a path is given."""
        page = render_html(self.report)
        if path is not None:
            write_text(path, page)
        return page

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it if a path is given."""
        content = self.report.model_dump_json(indent=1) + "\n"
        if path is not None:
            write_text(path, content)
        return content


def audit_model(
    model: PreTrainedModel | torch.nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    members: Sequence[str],
    non_members: Sequence[str],
    reference: PreTrainedModel | torch.nn.Module | str | Path | None = None,
    *,
    name: str = "model",
    member_groups: Sequence[str | None] | None = None,
    non_member_groups: Sequence[str | None] | None = None,
    progress: bool = False,
    **settings: Any,
) -> AuditResult:
    """Attack a model with membership inference on two lists of texts, and state what it gives away.

    The model is run once, without gradients, in evaluation mode, and left as it was, so that a trainer's callback may
    call this. Attacks that run a model again or need shadow models are those of ``dualtok audit``.

    Args:
        model: a Hugging Face causal language model in memory (also in peft's or DistributedDataParallel's wrapping), or
            a folder or hub name.
        tokenizer: the model's own; None takes that of a folder or hub name.
        members: texts that the model was trained on.
        non_members: texts of the same kind that it has not seen.
        reference: the attacker's reference model, of the same tokenizer; without it the attacks that compare with one
            are not run.
        name: of the model in tables.
        member_groups: group of each member, e.g. the person whom it is about.
        non_member_groups: likewise.
        progress: whether to show how far the passes are.
        **settings: further settings of the section ``audit``, e.g. ``attacks``, ``batch_size``, ``block_length``,
            ``confidence``, ``seed``.

    Raises:
        ConfigError: the tokenizer is missing, or a model is of a kind that cannot be run on packed texts.
        DataError: a list has no text that is not blank.
        ValueError: a setting is unknown or out of range.
    """
    config = AuditConfig(
        models={name: "in memory"},
        attack_reference=None if reference is None else "in memory",
        members=MEMBERS,
        non_members=NON_MEMBERS,
        group_field=None if member_groups is None and non_member_groups is None else "group",
        **_split_off(settings),
    )
    needing = [attack for attack in config.attacks if attack not in default_attacks()]
    if needing:
        raise ConfigError(f"audit_model: the attack {needing[0]!r} needs `dualtok audit`, which runs a model again")
    lists = {
        MEMBERS: _text_list(members, member_groups, config),
        NON_MEMBERS: _text_list(non_members, non_member_groups, config),
    }
    models = {name: model} | ({} if reference is None else {ATTACKER: reference})
    longest = settings.get("block_length") or LONGEST_BLOCK
    return AuditResult(_figures(config, models, tokenizer or _own_tokenizer(model), lists, longest, progress=progress))


def _figures(
    config: AuditConfig,
    models: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    lists: dict[str, TextList],
    longest: int,
    *,
    progress: bool,
) -> AuditFigures:
    """Run the models over the texts and attack what they give away."""
    loaded = {name: _loaded(own, config) for name, own in models.items()}
    with TemporaryDirectory(prefix="dualtok-audit-") as temporary:
        folder = Path(temporary)
        data = pack_texts(folder, lists, tokenizer, most_tokens=min([longest, *map(_context, loaded.values())]))
        signals = {
            name: _signals(own, data, config, folder, title=name, progress=progress) for name, own in loaded.items()
        }
        return attack_all(config, data, Seen(signals, groups=document_groups(config, data, folder)))


def _own_tokenizer(model: Any) -> PreTrainedTokenizerBase:
    if not isinstance(model, str | Path):
        raise ConfigError("audit_model: give the model's tokenizer")
    return load_tokenizer(model)


def _text_list(texts: Sequence[str], groups: Sequence[str | None] | None, config: AuditConfig) -> TextList:
    """Return a list with its groups, or nobody's where the other list alone has some."""
    if config.group_field is None:
        return TextList(texts)
    return TextList(texts, [None] * len(texts) if groups is None else groups)


def _split_off(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without those that are used here alone."""
    return {key: value for key, value in settings.items() if key != "block_length"}


def _loaded(model: Any, config: AuditConfig) -> PreTrainedModel:
    """Return the bare causal language model."""
    if isinstance(model, str | Path):
        return load_causal_lm(model, precision=config.precision, trust_remote_code=config.trust_remote_code)
    model = getattr(model, "module", model)
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bare


def _context(model: PreTrainedModel) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else LONGEST_BLOCK


def _signals(
    model: PreTrainedModel, data: DataFolder, config: AuditConfig, folder: Path, *, title: str, progress: bool
) -> dict[str, Signals]:
    device = next(model.parameters()).device
    passes = ModelPasses(config, data, folder, Ranks(0, 1, device), progress=progress)
    with _borrowed(model) as forward:
        found = {}
        for split in config.splits:
            builder = passes.over_split(split, forward, f"audit {title}, {split}")
            assert builder is not None
            found[split] = builder.build()
    return found


@contextmanager
def _borrowed(model: PreTrainedModel) -> Iterator[Callable[[Any], Any]]:
    """Give a forward pass of a model in memory to its signals; its mode and its output layer are put back after it."""
    layer, training = model.get_output_embeddings(), model.training
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    checked = False
    try:
        wrapped = SignalModel(model, token_signals).eval()

        def forward(batch: Any) -> Any:
            nonlocal checked
            here = {key: tensor.to(device) for key, tensor in batch.items()}
            with torch.no_grad():
                if not checked:
                    precision = "fp32" if dtype == torch.float32 else "bf16"
                    require_faithful(wrapped(check_batch(here), check=True), precision, type(model).__name__)
                    checked = True
                return wrapped(here)

        yield forward
    finally:
        model.set_output_embeddings(layer)
        model.train(training)
