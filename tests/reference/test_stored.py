"""Reference losses are read back as they were computed, or refused with the shard and the reason."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dualtok.data.folder import DataFolder
from dualtok.data.manifest import Manifest, load_manifest
from dualtok.errors import ConfigError, DataError
from dualtok.reference.fingerprint import Fingerprint, blocks_digest, fingerprint, weights_digest
from dualtok.reference.stored import StoredLosses, is_scored, score_path, scores_folder, write_index, write_scores
from tests.support import save_model

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED = Fingerprint("weights", "tokenizer", "blocks", "fp32")


def store(data_dir: Path, manifest: Manifest, split: str = "validation") -> dict[str, np.ndarray]:
    """Write made-up losses for a split and return them by shard."""
    generator = np.random.default_rng(0)
    folder = scores_folder(data_dir, EXPECTED)
    losses, files = {}, {}
    for shard in manifest.splits[split].shards:
        values = generator.random((shard.rows, manifest.block_length), dtype=np.float32)
        path = score_path(folder, split, shard.file)
        write_scores(path, values, shard.sha256)
        losses[shard.stem], files[f"{split}/{path.name}"] = values, _sha256(path)
    write_index(folder, EXPECTED, "models/reference", files)
    return losses


def _sha256(path: Path) -> str:
    from dualtok.files import file_sha256

    return file_sha256(path)


@pytest.fixture
def prepared(small_corpus: dict[str, Any], tmp_path: Path) -> tuple[Path, Manifest]:
    folder = tmp_path / "prepared"
    shutil.copytree(small_corpus["dir"], folder, ignore=shutil.ignore_patterns("scores"))
    return folder, load_manifest(folder)


def test_losses_come_back_bit_for_bit(prepared: tuple[Path, Manifest]) -> None:
    losses = store(*prepared)
    scores = StoredLosses(DataFolder(*prepared), "validation", EXPECTED)
    for stem, values in losses.items():
        rows = np.arange(len(values))[::-1]
        np.testing.assert_array_equal(scores.read(stem, rows), values[rows])


@pytest.mark.parametrize("part", ["weights", "tokenizer", "blocks", "precision"])
def test_scores_of_something_else_are_refused_and_say_what_differs(prepared: tuple[Path, Manifest], part: str) -> None:
    store(*prepared)
    values = {"weights": "weights", "tokenizer": "tokenizer", "blocks": "blocks", "precision": "fp32", part: "other"}
    with pytest.raises(DataError) as caught:
        StoredLosses(DataFolder(*prepared), "validation", Fingerprint(**values))
    assert f"those of models/reference differ in: {part}; " in str(caught.value).replace(")", "; ")
    assert "run `dualtok score`" in str(caught.value)


def test_each_kind_of_damage_names_the_shard(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    store(folder, manifest)
    shard = manifest.splits["validation"].shards[1]
    path = score_path(scores_folder(folder, EXPECTED), "validation", shard.file)
    whole = path.read_bytes()

    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            StoredLosses(DataFolder(folder, manifest), "validation", EXPECTED)
        assert shard.file in str(caught.value) or path.name in str(caught.value)
        return str(caught.value)

    path.write_bytes(whole[:-50])
    assert "altered" in refusal()
    path.write_bytes(whole[: len(whole) // 2] + b"\x00" + whole[len(whole) // 2 + 1 :])
    assert "altered" in refusal()
    path.unlink()
    assert "no reference losses for shard" in refusal()
    write_scores(path, np.zeros((shard.rows, manifest.block_length), np.float32), "another shard")
    store_index_of(folder, path)
    assert "made from another version of shard" in refusal()


def store_index_of(data_dir: Path, path: Path) -> None:
    write_index(
        scores_folder(data_dir, EXPECTED), EXPECTED, "models/reference", {f"validation/{path.name}": _sha256(path)}
    )


def test_unfinished_scoring_is_told_apart(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    store(folder, manifest)
    (scores_folder(folder, EXPECTED) / "scores.json").unlink()
    with pytest.raises(DataError, match="scoring did not finish"):
        StoredLosses(DataFolder(folder, manifest), "validation", EXPECTED)


def test_a_loss_that_is_not_finite_is_never_stored(tmp_path: Path) -> None:
    losses = np.zeros((3, 4), np.float32)
    losses[2, 1] = np.nan
    with pytest.raises(DataError, match="not finite in row 2"):
        write_scores(tmp_path / "shard.arrow", losses, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_score_file_belongs_to_one_shard(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = prepared
    first, second = manifest.splits["train"].shards[:2]
    path = tmp_path / "scores.arrow"
    write_scores(path, np.zeros((first.rows, 4), np.float32), first.sha256)
    assert is_scored(path, first)
    assert not is_scored(path, second)
    write_scores(path, np.zeros((first.rows - 1, 4), np.float32), first.sha256)
    assert not is_scored(path, first), "a row is missing"
    assert not is_scored(tmp_path / "absent.arrow", first)


def test_the_fingerprint_sees_weights_config_blocks_tokenizer_and_precision(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    _, manifest = prepared
    model = save_model(tmp_path / "model", seed=1)
    own = fingerprint(model, manifest, "fp32")
    shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy", manifest, "fp32") == own, "the folder's name must not matter"
    assert fingerprint(model, manifest, "bf16").differences(own) == ["precision"]
    assert fingerprint(save_model(tmp_path / "other", seed=2), manifest, "fp32").differences(own) == ["weights"]
    (tmp_path / "copy" / "config.json").write_text((model / "config.json").read_text().replace("10000.0", "20000.0"))
    assert weights_digest(tmp_path / "copy") != own.weights
    changed = manifest.model_copy(update={"tokenizer_fingerprint": "other"})
    assert fingerprint(model, changed, "fp32").differences(own) == ["tokenizer"]
    splits = dict(manifest.splits)
    del splits["auxiliary"]
    assert blocks_digest(manifest.model_copy(update={"splits": splits})) != own.blocks


def test_the_digest_of_a_mixture_sees_every_folder(prepared: tuple[Path, Manifest]) -> None:
    _, manifest = prepared
    splits = dict(manifest.splits)
    shards = splits["train"].shards
    altered = [shards[0].model_copy(update={"sha256": "other"}), *shards[1:]]
    splits["train"] = splits["train"].model_copy(update={"shards": altered})
    changed = manifest.model_copy(update={"splits": splits})
    digests = [
        blocks_digest(*manifests)
        for manifests in ((manifest,), (manifest, manifest), (manifest, changed), (changed, manifest))
    ]
    assert len(set(digests)) == 4


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights"):
        weights_digest(tmp_path)
