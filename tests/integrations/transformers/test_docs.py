"""The examples of the guide run as they are written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import datasets
import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dualtok.integrations import transformers as public
from dualtok.integrations.transformers import score_dataset
from tests.integrations.transformers.support import documents, tiny_llama
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("COMET_MODE", "DISABLED")
    tiny_llama(1).save_pretrained("reference")
    tiny_llama(2).save_pretrained("model")
    documents().save_to_disk("members")
    documents(20, seed=9).save_to_disk("others")
    return tmp_path


def test_the_ten_lines_train_and_save_a_model(here: Path) -> None:
    lines = [line for line in EXAMPLES[0].splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) <= 10
    found: dict = {}
    exec(compile(EXAMPLES[0], "docs/integrations.md", "exec"), found)
    log = found["trainer"].state.log_history
    assert {"evaluation/ref_auc", "evaluation/member_gap"} <= {name for line in log for name in line}
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) == 4  # 48 documents, 8 in a step, 20 steps
    before = AutoModelForCausalLM.from_pretrained("model").state_dict()
    after = AutoModelForCausalLM.from_pretrained("trained").state_dict()
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_the_loss_alone_trains_in_a_plain_trainer(here: Path) -> None:
    known = {
        **{name: getattr(public, name) for name in public.__all__},
        "Trainer": Trainer,
        "model": tiny_llama(2),
        "arguments": TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
        "members": score_dataset(tiny_llama(1), documents()),
    }
    exec(compile(EXAMPLES[1], "docs/integrations.md", "exec"), known)
    assert known["trainer"].train().global_step == 2
