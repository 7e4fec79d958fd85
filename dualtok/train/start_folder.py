"""``<output_dir>/start``: what a run began with, checked before the first weight is read, and what its exports need.

It holds the model's config, tokenizer and the further files of its base; for a model from a config its first weights;
for LoRA the adapters' settings. ``facts.json`` says what an export's model card tells.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.data.tokenizer import vocabulary_size
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.model.adapters import require_same_base, save_settings
from dualtok.model.check import check_fits, check_model
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.save import extra_files, write_config, write_tokenizer
from dualtok.model.folder.weights import model_folder
from dualtok.model.fresh import write_fresh_weights
from dualtok.model.load import starting_config
from dualtok.reference.fingerprint import blocks_digest
from dualtok.train.folder import ADAPTER_FOLDER, FACTS_FILE, RUN_FILE, START_FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from dualtok.config.model import ModelConfig
    from dualtok.config.run import RunConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.mixed import Source
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.adapters import Adapters


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LICENCE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


def write_start_folder(
    run: RunConfig,
    model: ModelConfig,
    sources: Sequence[Source],
    adapters: Adapters | None,
    ranks: Ranks,
    *,
    resumed: bool,
) -> Path:
    """Check the model against the blocks, write the start folder and return the folder of the weights to start from.

    Rank 0 does it.

    Raises:
        ConfigError: the model is not whole or does not fit the blocks, an adapter belongs to another base, or
            ``output_dir`` is not shared by all hosts.
    """
    output = Path(run.output_dir)

    def prepare() -> Path:
        data = [source.folder for source in sources]
        weights = _prepare(run, model, data, output / START_FOLDER, resumed=resumed)
        if adapters is not None:
            require_same_base(adapters, model_folder(weights))
            save_settings(adapters, output / START_FOLDER / ADAPTER_FOLDER)
        write_text(output / RUN_FILE, run.to_yaml())
        return weights

    folder = Path(ranks.first_does(prepare))
    ranks.together(lambda: _require_shared(output / RUN_FILE))
    return folder


def _prepare(run: RunConfig, model: ModelConfig, data: Sequence[DataFolder], start: Path, *, resumed: bool) -> Path:
    tokenizer = data[0].tokenizer
    config = starting_config(model, vocabulary_size(tokenizer))
    origin = str(model.path or "model.config")
    for folder in data:
        check_fits(config, folder, origin=origin)
    start.mkdir(parents=True, exist_ok=True)
    if model.path is None:
        empty_causal_lm(config, model.attention)
        settings = _fresh(
            config,
            model.config or {},
            tokenizer,
            start,
            untied=run.privacy is not None,
            seed=None if resumed else run.seed,
        )
    else:
        base = model_folder(model.path)
        check_model(base, data[0], origin=origin, attention=model.attention, trust_remote_code=model.trust_remote_code)
        settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
        for file in extra_files(base):
            shutil.copyfile(file, start / file.name)
        if model.trust_remote_code:  # an export is nothing without it
            for file in base.glob("*.py"):
                shutil.copyfile(file, start / file.name)
    if run.privacy is not None:
        _untie(settings)
    write_config(settings, start)
    write_tokenizer(tokenizer, start)
    if model.path is not None and not (start / "chat_template.jinja").is_file():
        template = model_folder(model.path) / "chat_template.jinja"
        if template.is_file():
            shutil.copyfile(template, start / template.name)
    split = "train" if run.train is None else run.train.split
    write_text(start / FACTS_FILE, json.dumps(_facts(split, model, data), indent=1))
    return Path(model.path or start)


def _fresh(
    config: PretrainedConfig,
    given: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    start: Path,
    *,
    untied: bool,
    seed: int | None,
) -> dict[str, Any]:
    """Write the first weights of a model from a configuration, unless ``seed`` is None; return its settings.

    Its special tokens are the tokenizer's: an architecture's defaults are another vocabulary's.
    """
    for name in TOKENS:
        if name not in given:
            setattr(config, name, getattr(tokenizer, name))
    if untied:
        config.tie_word_embeddings = False  # as DP-SGD trains it; see untie()
    if seed is not None:
        write_fresh_weights(config, seed, start)
    config.save_pretrained(start)
    settings: dict[str, Any] = json.loads((start / "config.json").read_text(encoding="utf-8"))
    return settings


def _untie(settings: dict[str, Any]) -> None:
    """Say of a model and its text part that the head has weights of its own, as DP-SGD trains it."""
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False


def _facts(split: str, model: ModelConfig, data: Sequence[DataFolder]) -> dict[str, Any]:
    """Return what a model card tells of the training: counts and names, no text of a document."""
    entries = [folder.manifest.splits[split] for folder in data]
    licence = None
    if model.path is not None:
        card = model_folder(model.path) / "README.md"
        head = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2] if card.is_file() else []
        found = LICENCE.search(head[0]) if head else None
        licence = found and found[1]
    local = model.path is not None and Path(model.path).is_dir()
    return {
        "base": Path(model.path).name if model.path is not None and local else model.path,
        "base_is_local": local,
        "license": licence,
        "split": split,
        "documents": sum(entry.documents for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "blocks": blocks_digest(*(folder.manifest for folder in data)),
    }


def _require_shared(file: Path) -> None:
    """Every rank writes its own part of a checkpoint, which is complete only in a folder that all hosts share."""
    if not file.is_file():
        raise ConfigError(
            f"output_dir: rank 0 wrote {file}, which another rank cannot see; use a folder that all hosts share"
        )
