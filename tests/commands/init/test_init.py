"""`dualtok init`: what it writes loads, keeps to the schema, and leads to a report by `dualtok run`."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
from itertools import islice
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from dualtok.commands.init.choose import Machine, block_length, choose, lanes, rate_of, targets
from dualtok.commands.init.look import Look, look_at
from dualtok.config.data import DataConfig
from dualtok.config.load import load_run
from dualtok.data.sources.corpora import sotu_passages, write_jsonl
from dualtok.data.tokenizer import save_tokenizer, train_tokenizer
from dualtok.errors import ConfigError
from dualtok.plan.shapes import NAMED
from tests.support import command, environment, save_model

if TYPE_CHECKING:
    from pathlib import Path

SOME = Look(documents=5000, whole=True, tokens=2_000_000, longest=500, exact=0, near=0, sampled=2000, vocabulary=4096)
MANY = Look(documents=10**6, whole=True, tokens=10**9, longest=3000, exact=0, near=0, sampled=2000, vocabulary=32_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus and a model with a tokenizer, as a user has them."""
    passages = [passage[:600] for passage in islice(sotu_passages(), 240)]
    write_jsonl(passages, tmp_path / "corpus.jsonl")
    save_tokenizer(train_tokenizer(passages, 512), tmp_path / "model")
    save_model(tmp_path / "model", 0, vocab_size=600, max_position_embeddings=128)
    return tmp_path


def init(folder: Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"stdin": subprocess.DEVNULL, **how}
    words = command("dualtok", *arguments)
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500, check=False, **how
    )


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check(folder: Path, file: str) -> dict[str, Any]:
    """Check a file that was written as a user's editor and `dualtok run` do; returns its settings."""
    text = (folder / file).read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first == "# yaml-language-server: $schema=run.schema.json"
    tree: dict[str, Any] = yaml.safe_load(text)
    jsonschema.Draft202012Validator(json.loads((folder / "run.schema.json").read_text())).validate(tree)
    load_run(folder / file)
    return tree


@pytest.mark.slow
def test_three_commands_lead_from_documents_and_a_model_to_a_report(folder: Path) -> None:
    shown = succeed(init(folder, "init", "--data", "corpus.jsonl", "--model", "model", "--gpus", "0"))
    assert "240 documents, about " in shown
    assert shown.splitlines()[-1] == "next: dualtok run run.yaml"
    tree = check(folder, "run.yaml")
    assert (tree["model"], tree["data"]["tokenizer"]) == ({"path": "model"}, "model")
    assert tree["data"]["block_length"] <= 128, "the model's context"
    ended = succeed(init(folder, "run", "run.yaml"))
    assert ended.splitlines()[-1] == "report: runs/dual/report/report.html"
    report = json.loads((folder / "runs" / "dual" / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["base", "reference alone", "plain", "dual"]


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "run.yaml").write_text("mine")
    ended = init(folder, "init", "--data", "corpus.jsonl", "--gpus", "0")
    assert ended.returncode == 2
    assert "run.yaml: exists already, and is not overwritten" in ended.stderr
    assert (folder / "run.yaml").read_text() == "mine"
    (folder / "run.schema.json").write_text("{}")
    ended = init(folder, "init", "--data", "corpus.jsonl", "--gpus", "0", "--out", "other.yaml")
    assert "run.schema.json: exists already with other content" in ended.stderr
    assert not (folder / "other.yaml").exists()


def test_a_new_model_fits_the_documents(folder: Path) -> None:
    succeed(init(folder, "init", "--data", "corpus.jsonl", "--gpus", "0", "--recipe", "pretrain"))
    tree = check(folder, "run.yaml")
    assert tree["model"]["config"]["hidden_size"] == 64
    assert tree["data"]["vocab_size"] == 1024
    assert tree["train"]["precision"] == "fp32"


def test_an_audit_of_texts(folder: Path) -> None:
    write_jsonl(islice(sotu_passages(), 300, 400), folder / "others.jsonl")
    texts = ["--data", "corpus.jsonl", "--non-members", "others.jsonl"]
    succeed(init(folder, "init", "--recipe", "audit", "--model", "model", *texts))
    tree = check(folder, "run.yaml")
    assert tree["audit"]["models"] == {"model": "model"}
    shown = succeed(init(folder, "run", "run.yaml", "--dry-run"))
    assert [line.split()[1] for line in shown.splitlines() if not line.startswith("#")] == ["audit", "report"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: missing, and there is no terminal to ask at"),
        (["--data", "nothing.jsonl"], "--data: nothing.jsonl is neither a file nor a folder"),
        (["--data", "corpus.jsonl", "--recipe", "finetun"], "--recipe 'finetun' (did you mean 'finetune'?)"),
        (["--data", "corpus.jsonl", "--recipe", "lora"], "--model: missing"),
        (["--data", "corpus.jsonl", "--recipe", "pretrain", "--model", "model"], "--model: has no effect"),
        (["--data", "corpus.jsonl", "--non-members", "corpus.jsonl"], "--non-members: only with --recipe audit"),
        (
            ["--data", "corpus.jsonl", "--recipe", "audit", "--model", "model", "--non-members", "corpus.jsonl"],
            "--non-members: the same texts as --data",
        ),
        (["--data", "corpus.jsonl", "--field", "body", "--gpus", "0"], "no field 'body'"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_written(folder: Path, arguments: list[str], message: str) -> None:
    ended = init(folder, "init", *arguments)
    assert ended.returncode == 2
    assert message in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert not (folder / "run.yaml").exists()


def test_at_a_terminal_it_asks(folder: Path) -> None:
    leader, follower = pty.openpty()
    try:
        os.write(leader, b"corpus.jsonl\nmodel\n")
        shown = succeed(init(folder, "init", "--gpus", "0", stdin=follower))
    finally:
        os.close(leader)
        os.close(follower)
    assert "Documents (a file or folder)" in shown
    assert check(folder, "run.yaml")["model"] == {"path": "model"}


def test_documents_are_looked_at(tmp_path: Path) -> None:
    passages = list(islice(sotu_passages(), 150))
    near = passages[0].split()
    near[3] = "changed"
    write_jsonl([*passages, passages[1], passages[1], " ".join(near)], tmp_path / "corpus.jsonl")
    look = look_at(DataConfig(dir="data", source=str(tmp_path / "corpus.jsonl")))
    assert (look.documents, look.exact, look.near, look.whole) == (151, 2, 1, True)
    texts = [*passages, " ".join(near)]
    tokenizer = train_tokenizer(texts, look.vocabulary or 0)
    assert look.tokens == sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def test_too_few_documents_are_refused() -> None:
    few = Look(documents=99, whole=True, tokens=50_000, longest=500, exact=0, near=0, sampled=99, vocabulary=1024)
    with pytest.raises(ConfigError, match=r"x: 99 different documents; five splits need 100"):
        choose("pretrain", None, {"dir": "d", "source": "x"}, few, machine=Machine(0))


@pytest.mark.parametrize(("gpus", "lora"), [(8, False), (1, True)])
def test_the_layout_is_planned_and_lora_chosen_where_all_weights_do_not_fit(
    tmp_path: Path, gpus: int, lora: bool
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(NAMED["meta-llama/Llama-2-7b-hf"]))
    machine = Machine(gpus, "h100", "1TB" if gpus > 1 else "64GB", tmp_path)
    choice = choose("finetune", str(model), {"dir": "d", "source": "x"}, MANY, machine=machine)
    assert ("lora" in choice.tree["model"], choice.recipe == "lora") == (lora, lora)
    assert ("so LoRA" in choice.layout) == lora
    (path,) = choice.files
    assert choice.tree["train"]["deepspeed"] == path == str(tmp_path / "deepspeed.json")
    assert json.loads(choice.files[path])["zero_optimization"]["stage"] >= (3 if gpus > 1 else 0)
    workflow = {"launcher": "torchrun", "ranks": gpus} if gpus > 1 else {"launcher": "none"}
    assert choice.tree["workflow"] == {"plain": True, **workflow}
    assert choice.tree["train"]["precision"] == "bf16"


def test_a_model_that_fits_in_no_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMED["meta-llama/Llama-2-70b-hf"]))
    with pytest.raises(ConfigError, match=r"--model: .* does not fit 1 x h100 in any layout"):
        choose("lora", str(tmp_path), {"dir": "d", "source": "x"}, MANY, machine=Machine(1, "h100", "64GB"))


def test_settings_follow_from_the_documents() -> None:
    assert [block_length(SOME, context, 0) for context in (None, 128)] == [512, 128]
    assert block_length(MANY, None, 8) == 1024
    assert [lanes(look, 512) for look in (SOME, MANY)] == [64, 64]
    assert targets(SOME) == [0.1]
    assert targets(MANY) == [0.1, 0.01, 0.001]
    assert rate_of("lora", 7 * 10**9) < rate_of("lora", 10**8)


def test_splits_have_a_step_each() -> None:
    small = Look(documents=200, whole=True, tokens=40_000, longest=300, exact=0, near=0, sampled=200, vocabulary=1024)
    tree = choose("pretrain", None, {"dir": "d", "source": "x"}, small, machine=Machine(0)).tree
    smallest = small.tokens * tree["data"]["shares"]["reference"] / tree["data"]["block_length"]
    assert tree["train"]["batch_size"] <= smallest
    smaller = dataclasses.replace(small, tokens=20_000)
    with pytest.raises(ConfigError, match=r"fewer than one step of 64 takes"):
        choose("pretrain", None, {"dir": "d", "source": "x"}, smaller, machine=Machine(64))
