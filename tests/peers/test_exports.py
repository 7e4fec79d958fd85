"""An export is read by transformers 4, peft, TRL and lm-eval as it is by the transformers that trained it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dualtok.data.tokenizer import load_tokenizer
from dualtok.model.folder.save import write_config
from tests.commands.test_export import MIXTRAL, base_model, short_run
from tests.support import ROOT, dualtok, environment, succeed

if TYPE_CHECKING:
    from pathlib import Path

PEERS = ROOT / "build" / "peers"
ARCHITECTURES: dict[str, dict[str, Any]] = {"llama": {}, "gpt_neox": {}, "mixtral": MIXTRAL}
IDS = [5, 17, 300, 44, 9, 211, 7, 7, 480]
TEXTS = ["The state of the Union is strong.", "We will build roads, schools and bridges; and pay for them."]

READ = """
import json, sys, torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model.eval()(torch.tensor([IDS])).logits
torch.manual_seed(0)
made = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=True, pad_token_id=1)
print(json.dumps({
    "version": transformers.__version__, "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
    "logits": logits.tolist(), "ids": [tokenizer(text)["input_ids"] for text in TEXTS], "made": made.shape[1],
    "eos": [tokenizer.eos_token_id, model.generation_config.eos_token_id],
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False),
}))
"""
PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    print(json.dumps({"logits": model(torch.tensor([IDS])).logits.tolist()}))
"""
TRL = """
import json, sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
settings = SFTConfig(output_dir=sys.argv[2], max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                     bf16=False, max_length=32, logging_steps=1)
trainer = SFTTrainer(model=sys.argv[1], args=settings, train_dataset=Dataset.from_dict({"text": TEXTS * 4}))
trainer.train()
print(json.dumps({"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}))
"""
LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], device="cpu", batch_size=1, dtype="float32")
asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
print(json.dumps({"scores": model.loglikelihood_rolling(asked, disable_tqdm=True)}))
"""


def ask(program: str, *arguments: Path) -> dict[str, Any]:
    """Run a program in the peers' environment and return the JSON of its last line."""
    if not PEERS.is_dir():
        pytest.fail("build/peers is not there: run `make test-peers`")
    content = program.replace("IDS", repr(IDS)).replace("TEXTS", repr(TEXTS))
    outcome = subprocess.run(
        [sys.executable, "-c", content, *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
        env=environment(PYTHONPATH=str(PEERS), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""),
        cwd="/",
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found: dict[str, Any] = json.loads(outcome.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def exports(small_corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return architecture -> its base model and an export of a run from it."""
    found = {}
    for name, settings in ARCHITECTURES.items():
        folder = tmp_path_factory.mktemp(name)
        base = base_model(folder / "base", name, small_corpus, rope_theta=50000.0, **settings)
        # As bases lie on the hub: transformers 5 would save a form that 4 does not read.
        write_config(json.loads((base / "config.json").read_text()), base)
        run = short_run(folder / "run.yaml", small_corpus, {"path": str(base)}, steps=3, learning_rate=1e-2)
        succeed(dualtok("export", run, folder / "export", "--checkpoint", "latest"))
        found[name] = base, folder / "export"
    return found


@torch.no_grad()
def own_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([IDS])).logits
    return logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_4_reads_an_export_as_it_reads_the_base(exports: dict[str, tuple[Path, Path]], name: str) -> None:
    base, export = exports[name]
    found, tokenizer = ask(READ, export), load_tokenizer(base)
    assert found["version"].startswith("4.57")
    assert found["missing"] == found["unexpected"] == []
    torch.testing.assert_close(torch.tensor(found["logits"]), own_logits(export), rtol=1e-4, atol=1e-5)
    assert (torch.tensor(found["logits"]) - own_logits(base)).abs().max() > 1e-3, "nothing was trained"
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found["eos"] == [tokenizer.eos_token_id, [0, 3]]
    assert found["chat"] == "hello"
    assert len(IDS) < found["made"] <= len(IDS) + 8


def test_transformers_4_reads_a_fresh_model(small_corpus: dict[str, Any], tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    }
    run = short_run(tmp_path / "run.yaml", small_corpus, {"config": config}, steps=3, learning_rate=1e-2)
    succeed(dualtok("export", run, tmp_path / "export"))
    (tmp_path / "export" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = ask(READ, tmp_path / "export")
    assert found["missing"] == found["unexpected"] == []
    torch.testing.assert_close(torch.tensor(found["logits"]), own_logits(tmp_path / "export"), rtol=1e-4, atol=1e-5)
    assert found["eos"][0] == found["eos"][1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_puts_an_exported_adapter_on_its_base(
    small_corpus: dict[str, Any], exports: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    base = exports[name][0]
    run = short_run(
        tmp_path / "run.yaml", small_corpus, {"path": str(base), "lora": {"rank": 2}}, steps=3, learning_rate=1e-1
    )
    succeed(dualtok("export", run, tmp_path / "adapter", "--checkpoint", "latest"))
    succeed(dualtok("export", run, tmp_path / "merged", "--checkpoint", "latest", "--merge"))
    found = torch.tensor(ask(PEFT, base, tmp_path / "adapter")["logits"])
    torch.testing.assert_close(found, own_logits(tmp_path / "merged"), rtol=1e-3, atol=1e-4)
    assert (found - own_logits(base)).abs().max() > 1e-3, "nothing was trained"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trl_trains_on_from_an_export(exports: dict[str, tuple[Path, Path]], tmp_path: Path, name: str) -> None:
    losses = ask(TRL, exports[name][1], tmp_path / "out")["losses"]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lm_eval_scores_an_export(exports: dict[str, tuple[Path, Path]], name: str) -> None:
    export = exports[name][1]
    tokenizer = load_tokenizer(export)
    scores = ask(LM_EVAL, export)["scores"]
    for text, score in zip(TEXTS, scores, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]  # its own beginning
        with torch.no_grad():
            from transformers import AutoModelForCausalLM

            logits = AutoModelForCausalLM.from_pretrained(export).eval()(torch.tensor([ids[:-1]])).logits
        own = -torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="sum")
        assert score == pytest.approx(float(own), rel=1e-4)
