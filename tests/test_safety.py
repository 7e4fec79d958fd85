"""What docs/safety.md promises: no foreign code is run, no name leads out of its folder, modes follow the umask."""

from __future__ import annotations

import json
import os
import pickle
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dualtok.config.data import DataConfig
from dualtok.config.load import load_run, parse_run
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import MANIFEST, load_manifest
from dualtok.data.prepare.pipeline import prepare
from dualtok.data.prepare.splits import assign_split, content_digest
from dualtok.data.sources.documents import read_documents
from dualtok.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from dualtok.errors import CheckpointError, ConfigError, DataError
from dualtok.model.adapters import read_adapter_settings
from dualtok.model.check import check_same_tokenizer
from dualtok.model.empty import empty_causal_lm
from dualtok.model.folder.weights import WeightFiles
from dualtok.model.fresh import write_fresh_weights
from dualtok.model.load import load_causal_lm, read_model_config
from dualtok.reference.fingerprint import weights_digest
from tests.data.support import SHARES, whole_documents, write_prepared
from tests.support import (
    BLOCK_LENGTH,
    VOCABULARY,
    dualtok,
    error_line,
    save_model,
    succeed,
    tiny_llama_config,
    write_run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OWN_CODE = """
import os
open(os.environ["DUALTOK_TEST_MARKER"], "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that foreign code writes when it is run; what it is copied to lies in a folder of the test."""
    path = tmp_path / "was-run"
    monkeypatch.setenv("DUALTOK_TEST_MARKER", str(path))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where it is told nothing
    return path


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """Return a model folder whose classes are in a file of its own."""
    folder = save_model(tmp_path / "own", seed=1)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config.update(model_type="own", auto_map=names, attn_implementation="somebody/kernel")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(OWN_CODE)
    return folder


def test_code_of_a_model_is_not_run_unless_it_is_asked_for(marker: Path, own_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"own: brings Python code of its own.*set model\.trust_remote_code: true"):
        read_model_config(own_model)
    with pytest.raises(ConfigError, match=r"set reference\.trust_remote_code: true"):
        read_model_config(own_model, setting="reference.trust_remote_code")
    with pytest.raises(ConfigError, match="brings Python code of its own"):
        load_causal_lm(own_model)
    assert not marker.exists()
    config = read_model_config(own_model, trust_remote_code=True)
    assert marker.exists(), "the test's code would never have been noticed"
    assert type(config).__name__ == "OwnConfig"
    assert config._attn_implementation is None, "config.json could name a kernel from the hub"
    assert type(load_causal_lm(own_model, trust_remote_code=True)).__name__ == "OwnModel"


def test_code_for_an_architecture_that_transformers_knows_is_left_alone(marker: Path, own_model: Path) -> None:
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert type(load_causal_lm(own_model)).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_code_of_a_tokenizer_is_never_run(marker: Path, small_corpus: dict[str, Any], tmp_path: Path) -> None:
    data = small_corpus
    save_tokenizer(train_tokenizer(["some text"], 300), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "own_code.py").write_text(OWN_CODE)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "own"}')
    with pytest.raises(DataError, match=r"tokenizer brings Python code of its own.*never runs.*data\.tokenizer"):
        load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"reference\.model x: .*the tokenizer brings Python code of its own"):
        check_same_tokenizer(tmp_path / "tokenizer", DataFolder(data["dir"]), origin="reference.model x")
    assert not marker.exists()


def test_trust_is_asked_for_by_name_and_where_it_has_an_effect() -> None:
    train = {"learning_rate": 1e-3, "batch_size": 4, "steps": 1}
    tree: dict[str, Any] = {"data": {"dir": "a"}, "objective": "causal_lm", "model": {"path": "x"}, "train": train}
    run = parse_run({**tree, "reference": {"model": "y"}})
    assert run.model is not None
    assert run.reference is not None
    assert [part.trust_remote_code for part in (run.model, run.reference, run.audit)] == [False] * 3
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code: has no effect without model\.path"):
        parse_run({**tree, "model": {"config": {"model_type": "llama"}, "trust_remote_code": True}})
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code: train\.engine=pipeline"):
        parse_run(
            {
                **tree,
                "model": {"path": "x", "trust_remote_code": True},
                "train": {**train, "engine": "pipeline", "pipeline": {"stages": 2}},
            }
        )


def test_own_code_is_part_of_what_scores_depend_on(own_model: Path) -> None:
    before = weights_digest(own_model)
    (own_model / "own_code.py").write_text(OWN_CODE + "\n")
    assert weights_digest(own_model) != before


class _Evil:
    """Runs something when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


def test_pickled_weights_are_read_as_tensors_or_not_at_all(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=1)
    weights = load_file(folder / "model.safetensors")
    expected = load_causal_lm(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    found = load_causal_lm(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    torch.save({**weights, "evil": _Evil(tmp_path / "was-run")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights .* hold more than tensors.*safetensors"):
        load_causal_lm(folder)
    assert not (tmp_path / "was-run").exists()
    pickle.loads(pickle.dumps(_Evil(tmp_path / "was-run")))
    assert (tmp_path / "was-run").exists(), "the test's pickle would never have been noticed"


@pytest.mark.parametrize("name", ["../x.safetensors", "a/../../x.safetensors", "/tmp/x.safetensors"])
def test_an_index_of_weights_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "model", seed=1)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ConfigError, match=r"index\.json: names .*x\.safetensors', which is outside the model's folder"):
        load_causal_lm(folder)
    with pytest.raises(ConfigError, match="outside the model's folder"):
        WeightFiles(folder, empty_causal_lm(read_model_config(folder)))


@pytest.mark.parametrize("name", ["../shard-00000-00000.arrow", "/etc/passwd", "a/b.arrow", "..", ".hidden", ""])
@pytest.mark.parametrize("where", ["shard", "split"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str, where: str) -> None:
    folder = write_prepared(tmp_path / "prepared", whole_documents(8), lanes=2, rows_per_shard=4)
    values = json.loads((folder / MANIFEST).read_text())
    if where == "shard":
        values["splits"]["train"]["shards"][0]["file"] = name
    else:
        values["splits"][name] = values["splits"]["train"]
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"manifest\.json: malformed"):
        load_manifest(folder)


def test_a_pointer_cannot_lead_out_of_the_checkpoints(tmp_path: Path) -> None:
    from dualtok.train.checkpoints.writer import find_checkpoint

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "COMPLETE").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").write_text("../elsewhere")
    for which in ("best", "../elsewhere", str(tmp_path / "elsewhere")):
        with pytest.raises(CheckpointError, match="is no checkpoint's name"):
            find_checkpoint(tmp_path / "checkpoints", which)


def test_an_adapter_cannot_name_a_module_to_import(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", seed=1)
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "megatron_config": {"a": 1},
        "megatron_core": "antigravity",
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match="megatron_config"):
        read_adapter_settings(tmp_path / "adapter", read_model_config(base))


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> list[str]:
    """Return what in a folder has other rights than the umask gives."""
    wrong = []
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong.append(f"{path.relative_to(folder)} {mode:o}")
    return wrong


def test_prepared_data_and_models_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    from transformers import AutoConfig

    root = tmp_path / "all"
    root.mkdir()
    (root / "corpus.txt").write_text("\n\n".join(f"passage {number} of a small corpus" for number in range(200)))
    prepare(
        DataConfig(
            str(root / "data"),
            source=str(root / "corpus.txt"),
            txt_documents="paragraph",
            block_length=16,
            near_duplicate_threshold=None,
            vocab_size=300,
            lanes=2,
            shares=SHARES,
        ),
        progress=False,
    )
    settings = tiny_llama_config(vocab_size=VOCABULARY)
    write_fresh_weights(AutoConfig.for_model(settings.pop("model_type"), **settings), 0, root / "model")
    assert wrong_modes(root, umask) == []
    assert len(list(root.rglob("*"))) > 15


def test_an_error_about_settings_repeats_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  dir: a\n  stream: {storage_options: {secret_key: hunter2} \n")
    with pytest.raises(ConfigError, match=r"not valid YAML.*line \d+") as caught:
        load_run(path)
    assert "hunter2" not in str(caught.value)
    streams: list[dict[str, Any]] = [
        {"storage_options": "hunter2"},
        {"storage_environment": {"token": ["hunter2"]}},
        {"storage_options": {"secret": "hunter2"}},
        {"endpoint_url": "https://me:hunter2@host"},
    ]
    for stream in streams:
        with pytest.raises(ConfigError) as caught:
            parse_run({"data": {"dir": "s3://bucket/a", "stream": stream}})
        assert "hunter2" not in str(caught.value)
        assert "data.stream" in str(caught.value)


CANARY = "zquillplover"
"""A word of private documents alone."""
SECRET = "zqsecret5f3a"
"""The value of environment variables that hold credentials."""


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "%s", }',
        b'{"text": "%s',
        b'["%s"]',
        b'{"%s is all that it says": 1}',
        b'{"text": ["%s"]}',
        b'{"text": "%s \\ud800"}',
        b'{"text": "%s \xe9"}',
    ],
)
def test_an_error_about_a_document_repeats_none_of_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(content % CANARY.encode())
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: ") as caught:
        prepare(DataConfig(str(tmp_path / "data"), source=str(tmp_path / "corpus.jsonl")), progress=False)
    assert CANARY not in str(caught.value)


def test_an_error_about_a_row_of_parquet_or_a_dataset_repeats_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CANARY.encode() + b"\xff"
    offsets = np.array([0, len(text)], np.int32)
    column = pa.StringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(text))
    pq.write_table(pa.table({"text": column}), tmp_path / "corpus.parquet")
    with pytest.raises(DataError, match=r"corpus\.parquet: row 0: not UTF-8") as caught:
        list(read_documents(DataConfig("data", source=str(tmp_path / "corpus.parquet"))))
    assert CANARY not in str(caught.value)

    class Dataset:
        column_names = ("text",)

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ValueError(f"cannot cast {CANARY}")

    class Builder:
        config = None

        def as_streaming_dataset(self, split: str) -> Dataset:
            return Dataset()

    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: Builder())
    with pytest.raises(DataError, match=r"somebody/corpus: cannot be read after row 0 \(ValueError\)") as caught:
        list(read_documents(DataConfig("data", source="somebody/corpus")))
    assert CANARY not in str(caught.value)


def private_corpus(path: Path, shares: dict[str, float]) -> Path:
    """Write 200 documents, of which those that will be members hold the canary."""
    lines = []
    for number in range(200):
        draw = np.random.default_rng(number)
        text = " ".join(f"word{draw.integers(100)}" for _ in range(40))
        private = f"{text} {CANARY} {text}"
        member = assign_split(content_digest(private), shares, 0) == "train"
        lines.append(json.dumps({"text": private if member else text}))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_no_output_of_a_whole_run_holds_text_or_secrets(tmp_path: Path) -> None:
    shares = {"train": 0.4, "reference": 0.2, "validation": 0.2, "held_out": 0.2}
    root, before = tmp_path / "all", os.umask(0o027)
    try:
        root.mkdir()
        source = private_corpus(tmp_path / "corpus.jsonl", shares)
        data = {
            "dir": str(root / "data"),
            "source": str(source),
            "block_length": BLOCK_LENGTH,
            "lanes": 2,
            "vocab_size": VOCABULARY,
            "near_duplicate_threshold": None,
            "shares": shares,
        }
        reference, exported = save_model(tmp_path / "reference", seed=1), root / "exported"
        run = write_run(
            root / "run.yaml",
            data,
            model={"config": tiny_llama_config()},
            monitor={"log_every": 1},
            reference={"model": str(reference)},
            train={"learning_rate": 1e-3, "batch_size": 4, "steps": 1, "precision": "fp32", "evaluation_blocks": 8},
            audit={
                "models": {"dual": str(exported)},
                "attack_reference": str(reference),
                "runs": {"dual": str(root / "run")},
                "bootstrap_resamples": 100,
                "fpr_targets": [0.5],
            },
        )
        secrets: dict[str, Any] = {"AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET, "MY_PASSWORD": SECRET}
        said = []
        for arguments in (
            ["prepare", run],
            ["score", run],
            ["train", run],
            ["export", root / "run", exported],
            ["audit", run],
            ["report", run],
        ):
            result = dualtok(*arguments, **secrets)
            said += [succeed(result), result.stderr]
        failed = dualtok(
            "train",
            run,
            f"output_dir={root / 'failed'}",
            "train.learning_rate=1e30",
            "train.steps=3",
            "train.gradient_clipping=0",
            **secrets,
        )
        said.append(error_line(failed) + failed.stdout)
        for word in (CANARY, SECRET):
            assert word not in "".join(said)
            holders = [path for path in root.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
            assert holders == []
        tokenizer = load_tokenizer(root / "data" / "tokenizer")
        trained_on = DataFolder(root / "data").open("train").read(range(20))["input_ids"]
        assert CANARY in tokenizer.decode(trained_on.flatten()), "there was nothing to be found"
        assert wrong_modes(root, 0o027) == []
        assert {"events", "report", "audit", "checkpoints", "start"} <= {path.name for path in (root / "run").iterdir()}
    finally:
        os.umask(before)
