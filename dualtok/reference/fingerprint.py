"""Which scores belong to which weights, tokenizer, blocks and precision.

Reference losses are data only as long as all four are the ones they were computed from; the fingerprint names that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError
from dualtok.model.folder.weights import WEIGHT_PATTERNS, model_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dualtok.config.reference import ReferenceConfig
    from dualtok.data.manifest import Manifest


@dataclass(frozen=True)
class Fingerprint:
    """What reference losses depend on, each part as a SHA-256 hex digest (precision in words)."""

    weights: str
    tokenizer: str
    blocks: str
    precision: str

    @property
    def digest(self) -> str:
        """Short name of the whole, used as a folder name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> list[str]:
        """Return the names of the parts in which two fingerprints differ."""
        theirs = asdict(other)
        return [name for name, value in asdict(self).items() if theirs[name] != value]


def weight_files(folder: Path) -> list[Path]:
    """Return a model folder's weight files in the order of their names.

    Raises:
        ConfigError: the folder holds no weights.
    """
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    if not files:
        raise ConfigError(f"{folder}: no weights ({' or '.join(WEIGHT_PATTERNS)}); write a model with `dualtok export`")
    return files


def weights_digest(path: str | Path) -> str:
    """Return the SHA-256 over a model's ``config.json``, weight files and own code, in the order of their names.

    Raises:
        ConfigError: the folder holds no weights.
    """
    folder = model_folder(path)
    whole = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder), *sorted(folder.glob("*.py"))]:
        with file.open("rb") as stream:
            whole.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def blocks_digest(*manifests: Manifest) -> str:
    """Return the SHA-256 over the checksums of all shards of all splits, in the order of their names; of several
    folders that are mixed, folder by folder."""
    folders = [
        "\n".join(
            sorted(
                f"{manifest.folder_of(split)}/{shard.file}:{shard.sha256}"
                for split, entry in manifest.splits.items()
                for shard in entry.shards
            )
        )
        for manifest in manifests
    ]
    return hashlib.sha256("\n\n".join(folders).encode()).hexdigest()


def reference_fingerprint(reference: ReferenceConfig, manifest: Manifest) -> Fingerprint:
    """Fingerprint the losses that a run's reference, of one model or cross-fitted, gives to the blocks.

    Raises:
        ConfigError: a model has no weights.
    """
    models = [fingerprint(model, manifest, reference.precision) for model in reference.models]
    return models[0] if len(models) == 1 else cross_fitted(models)


def cross_fitted(folds: Sequence[Fingerprint]) -> Fingerprint:
    """Return the fingerprint of losses that come from several models, fold by fold of the documents."""
    weights = hashlib.sha256("\n".join(["cross-fitted", *(fold.weights for fold in folds)]).encode()).hexdigest()
    return replace(folds[0], weights=weights)


def fingerprint(model: str | Path, manifest: Manifest, precision: str) -> Fingerprint:
    """Fingerprint the losses that ``model`` gives to the blocks of ``manifest`` in ``precision``.

    Args:
        model: folder of the reference, whose weights are hashed.
        manifest: of the prepared data.
        precision: of the forward pass, ``fp32`` or ``bf16``.

    Raises:
        ConfigError: the folder holds no weights.
    """
    return Fingerprint(weights_digest(model), manifest.tokenizer_fingerprint, blocks_digest(manifest), precision)
