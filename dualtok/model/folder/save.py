"""Models out: under the names and with the settings that transformers' own folders have, so that other readers take
them as well.

transformers 5 keeps some parameters under other names, and some in other pieces, than its folders do (GPT-NeoX's head,
the experts of Mixtral), and writes rope and tokenizer classes in a form that transformers 4 does not read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from dualtok.data.sentencepiece_model import MODEL_FILES
from dualtok.data.tokenizer import KNOWN_FILES
from dualtok.files import grant_as_umask_does, write_text
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.weights import INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Imported where they are used, for what they take to load: transformers (1 to 4 s).

WEIGHTS_PATTERN = "model{suffix}.safetensors"
OLDER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names of tokenizer classes in transformers 5, and what transformers 4 knows them by; 5 reads both."""
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".md")
KEPT_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
KEPT_BYTES = 10 * 2**20
"""What is larger is no setting or notice of a model."""
OWN_FILES = ("config.json", "README.md", "adapter_config.json")
"""Files that an export writes itself, or must not hold."""


def write_weights(
    config: PretrainedConfig,
    shapes: dict[str, torch.Size],
    read: Callable[[str], torch.Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_size: str,
) -> None:
    """Write a model's parameters as ``save_pretrained`` does, one file's at a time.

    Args:
        config: of the model.
        shapes: parameter's name in the causal language model -> its shape.
        read: returns a parameter, float32.
        folder: where to write.
        dtype: of the tensors in the files.
        shard_size: largest file (a larger parameter has one to itself), and so the memory that is needed.
    """
    stored, source = _stored_as(
        config, {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    )
    plan = split_torch_state_dict_into_shards(stored, filename_pattern=WEIGHTS_PATTERN, max_shard_size=shard_size)
    pieces = _Pieces(config, read, dtype)
    for file, members in plan.filename_to_tensors.items():
        save_file({name: pieces.get(name, source[name]) for name in members}, folder / file, {"format": "pt"})
        grant_as_umask_does(folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=1, sort_keys=True))


class _Pieces:
    """Stored tensors, made of the parameters that they come from; those of one group of parameters are kept."""

    def __init__(self, config: PretrainedConfig, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> None:
        self._model = empty_causal_lm(config)
        self._read, self._dtype = read, dtype
        self._group: tuple[str, ...] = ()
        self._tensors: dict[str, torch.Tensor] = {}

    def get(self, name: str, group: tuple[str, ...]) -> torch.Tensor:
        """Return a stored tensor that comes from a group of parameters."""
        from transformers.core_model_loading import revert_weight_conversion

        if group != self._group:
            whole = {parameter: self._read(parameter).to(self._dtype) for parameter in group}
            self._group, self._tensors = group, revert_weight_conversion(self._model, whole)
        return self._tensors[name].contiguous().clone()


def _stored_as(
    config: PretrainedConfig, shapes: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
    """Return stored name -> shape, and stored name -> the parameters that it is made of."""
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_causal_lm(config)
    whole = revert_weight_conversion(model, dict(shapes))
    stored: dict[str, torch.Tensor] = {}
    source: dict[str, tuple[str, ...]] = {}
    together: list[str] = []
    for name, shape in shapes.items():
        alone = revert_weight_conversion(model, {name: shape})
        if all(key in whole and whole[key].shape == piece.shape for key, piece in alone.items()):
            stored |= alone
            source |= dict.fromkeys(alone, (name,))
        else:  # made of several parameters, e.g. of queries, keys and values
            together.append(name)
    for key in whole.keys() - stored.keys():
        stored[key], source[key] = whole[key], tuple(together)
    return stored, source


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write ``config.json`` so that transformers 4 reads the same model from it as transformers 5."""
    write_text(folder / "config.json", json.dumps(_with_older_names(config), indent=2, sort_keys=True) + "\n")


def _with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that says beside ``rope_parameters`` what transformers 4 calls it."""
    filled = {
        key: _with_older_names(value) if isinstance(value, dict) and "model_type" in value else value
        for key, value in config.items()
    }
    rope = filled.get("rope_parameters")
    if not isinstance(rope, dict):
        return filled
    full, local = (rope, None) if "rope_theta" in rope else (rope.get("full_attention"), rope.get("sliding_attention"))
    if isinstance(full, dict) and "rope_theta" in full:
        filled.setdefault("rope_theta", full["rope_theta"])
        part = full.get("partial_rotary_factor")
        if part is not None:
            filled.setdefault("partial_rotary_factor", part)
        if str(filled.get("model_type")).startswith("gpt_neox"):
            filled.setdefault("rotary_emb_base", full["rope_theta"])
            filled.setdefault("rotary_pct", 1.0 if part is None else part)
        if full.get("rope_type", "default") != "default":
            filled.setdefault("rope_scaling", {k: v for k, v in full.items() if k != "rope_theta"})
    if isinstance(local, dict) and "rope_theta" in local:
        filled.setdefault("rope_local_base_freq", local["rope_theta"])
    return filled


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under a class that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = OLDER_CLASS.get(settings.get("tokenizer_class"))
    if known is not None:
        settings["tokenizer_class"] = known
        settings.pop("backend", None)
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # transformers 4 takes names for them
        del settings["extra_special_tokens"]
        settings.setdefault("additional_special_tokens", extra)
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def extra_files(base: Path) -> Iterable[Path]:
    """Return the files of a base model that its fine-tuned descendants keep: generation settings, templates, licences.

    Not weights, nor what is written anew (``config.json``, the tokenizer, the model card). A SentencePiece model stays
    beside the fast tokenizer that gives its ids: some runtimes read nothing else.
    """
    for file in sorted(base.iterdir()):
        is_notice = file.name.upper().startswith(KEPT_NAMES)
        wanted = is_notice or file.suffix in KEPT_SUFFIXES
        own = file.name in (*OWN_FILES, *KNOWN_FILES) or file.name.endswith(".index.json")
        if ((wanted and not own) or file.name in MODEL_FILES) and file.is_file() and file.stat().st_size <= KEPT_BYTES:
            yield file
