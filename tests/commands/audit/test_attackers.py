"""References of the attacker's that are trained on the way, by the recipe of the audited run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from tests.support import dualtok, error_line, save_model, succeed, write_run


@pytest.mark.slow
def test_the_recipe_is_that_of_the_run(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", 1)
    AutoTokenizer.from_pretrained(Path(small_corpus["dir"]) / "tokenizer").save_pretrained(base)
    texts = [json.loads(line)["text"] for line in Path(small_corpus["source"]).read_text().splitlines()[:30]]
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts))
    train = {"learning_rate": 3e-3, "batch_size": 4, "steps": 7, "warmup_steps": 2, "precision": "fp32"}
    audit = {
        "models": {"one": str(save_model(tmp_path / "one", 2))},
        "attack_reference": f"train:{others}",
        "attacks": ["ref"],
        "bootstrap_resamples": 100,
        "permutations": 99,
    }
    data = {"dir": small_corpus["dir"]}
    run = write_run(tmp_path / "run.yaml", data, objective="dual", model={"path": str(base)}, train=train, audit=audit)
    assert "without a launcher first" in error_line(dualtok("audit", run, WORLD_SIZE="2", RANK="0"))
    succeed(dualtok("audit", run))
    (folder,) = (tmp_path / "run" / "audit" / "references").iterdir()
    made = yaml.safe_load((folder / "run.yaml").read_text())
    assert (made["objective"], made["model"]["path"]) == ("causal_lm", str(base))
    assert {key: made["train"][key] for key in train} == train
    assert made["train"]["split"] == "train"
    (reference,) = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())["references"]
    assert reference["perplexity_non_members"] < 512, "it has learned something of 512 ids"
    nowhere = write_run(tmp_path / "nowhere.yaml", data, audit=audit)
    assert "is trained from the base; give audit.base" in error_line(dualtok("audit", nowhere))
