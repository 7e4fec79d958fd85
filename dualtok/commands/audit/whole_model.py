"""A peft adapter folder, and the model that it makes of its base."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError
from dualtok.files import atomic_folder, file_sha256
from dualtok.model.adapters import CONFIG_FILE
from dualtok.model.folder.weights import SETTINGS_PATTERNS, model_folder
from dualtok.model.load import load_causal_lm
from dualtok.reference.fingerprint import weights_digest

if TYPE_CHECKING:
    from pathlib import Path

# Imported where they are used, for what they take to load: peft (3 s).


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a peft adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(adapter: Path) -> str:
    """Return the base model that an adapter's folder names: a folder or a hub name.

    Raises:
        ConfigError: it names none.
    """
    path = adapter / CONFIG_FILE
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{path}: malformed; save the adapter again with peft's save_pretrained") from None
    if not base:
        raise ConfigError(f"{path}: names no base_model_name_or_path; say which model the adapter belongs to (--base)")
    return str(base)


def merge_adapter(base: Path, adapter: Path, root: Path, *, trust_remote_code: bool = False) -> Path:
    """Return a model folder in fp32 with an adapter added to its base's weights; made once, whole or not at all.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter; its tokenizer, if it has one, takes the place of the base's.
        root: where the folder is made, under a name of both.
        trust_remote_code: run Python code that the base brings.

    Raises:
        ConfigError: the adapter does not fit the base, or is of a kind that cannot be merged.
    """
    files = sorted(file for file in adapter.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    content = "\n".join([weights_digest(base), *(f"{file.name}:{file_sha256(file)}" for file in files)])
    target = root / hashlib.sha256(content.encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    import peft

    model = load_causal_lm(base, trust_remote_code=trust_remote_code)
    try:
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{adapter}: cannot be merged into {base}: {reason}") from None
    with atomic_folder(target) as folder:
        for source in (base, adapter):
            for file in (file for pattern in SETTINGS_PATTERNS for file in source.glob(pattern)):
                if file.name not in (CONFIG_FILE, "config.json", "README.md") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
        merged.save_pretrained(folder)
    return target


def whole_model(
    path: str | Path,
    adapter: str | Path | None,
    base: str | Path | None,
    root: Path,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Return the local folder of a model that may be given as a peft adapter, merged where there is one.

    Args:
        path: folder or hub name of a model or of an adapter.
        adapter: folder or hub name of an adapter for it.
        base: the base of an adapter; None takes the one that it names.
        root: where merged models are kept.
        trust_remote_code: run Python code that the base brings.

    Raises:
        ConfigError: there is no such model or adapter, or they do not fit.
    """
    folder = model_folder(path)
    if adapter is None and not is_adapter(folder):
        return folder
    if adapter is not None:
        added = model_folder(adapter)
        if not is_adapter(added):
            raise ConfigError(f"{adapter}: not a peft adapter folder ({CONFIG_FILE}, and no config.json)")
        return merge_adapter(folder, added, root, trust_remote_code=trust_remote_code)
    return merge_adapter(model_folder(base or base_of(folder)), folder, root, trust_remote_code=trust_remote_code)
