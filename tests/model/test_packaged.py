"""The pretrained model that comes as a package: its weights against the file's bytes, its tokenizer, what it knows."""

from __future__ import annotations

import json
import math
from importlib.metadata import distribution
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualtok.data.sources.corpora import wikipedia_leads
from dualtok.errors import ConfigError
from dualtok.model.folder import packaged
from dualtok.model.folder.packaged import FILE, PACKAGE, write_smollm2
from tests.support import read_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smollm2(tmp_path_factory.mktemp("packaged") / "smollm2")


def stored(name: str) -> tuple[Any, NDArray[np.uint8]]:
    """Return a tensor's entry in the file, and its bytes."""
    import gguf

    reader = gguf.GGUFReader(str(distribution(PACKAGE).locate_file(FILE)))
    entry = next(tensor for tensor in reader.tensors if tensor.name == name)
    return entry, np.frombuffer(np.ascontiguousarray(entry.data).tobytes(), np.uint8)


@pytest.mark.slow
def test_the_weights_are_the_files_dequantized(smollm2: Path) -> None:
    """Q4_1: 32 weights share a scale and a minimum in half precision; Q8_0: 32 share a scale."""
    weights = read_weights(smollm2)
    entry, content = stored("blk.3.ffn_gate.weight")
    assert entry.tensor_type.name == "Q4_1"
    blocks = content.reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    gate = weights["model.layers.3.mlp.gate_proj.weight"]
    np.testing.assert_allclose(gate.numpy().reshape(-1, 32), nibbles * scale + least, rtol=1e-6)

    entry, content = stored("token_embd.weight")
    assert entry.tensor_type.name == "Q8_0"
    blocks = content.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    embeddings = weights["model.embed_tokens.weight"].numpy().reshape(-1, 32)
    np.testing.assert_allclose(embeddings, blocks[:, 2:].view(np.int8) * scale, rtol=1e-6)
    assert "lm_head.weight" not in weights
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config


@pytest.mark.slow
def test_numbers_are_cut_into_digits_and_every_text_comes_back(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 1987, we don't") == ["In", "Ġ", "1", "9", "8", "7", ",", "Ġwe", "Ġdon", "'t"]
    assert tokenizer.tokenize(" \u0967\u0968")[0] == "Ġ", "a space before Devanagari digits is cut off"
    for text in (" two  spaces\n\tand a tab", "Ünïcödé 漢字 🙂", "x = 12.5e-3", *islice(wikipedia_leads(), 5)):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer("<|im_start|>user").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False).endswith(
        "<|im_start|>user\nHello<|im_end|>\n"
    )


@pytest.mark.slow
def test_it_knows_english(smollm2: Path) -> None:
    """A weight at the wrong place, or a text cut otherwise, would cost it most of what it knows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    total, count = 0.0, 0
    for text in islice(wikipedia_leads(), 0, 200, 40):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert math.exp(total / count) < 22


def test_a_missing_package_is_named_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=r"'no-such-package' is not installed; run .*requirements-models"):
        write_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()
