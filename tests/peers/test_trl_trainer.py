"""TRL's SFTTrainer with DualMixin trains as DualTrainer does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path

TRL = ROOT / "build" / "trl"
TRAIN = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from dualtok.errors import DualtokError
from dualtok.integrations.transformers import DualMixin, DualTrainer, score_dataset
from tests.integrations.transformers.support import arguments, documents, tiny_llama

class DualSFTTrainer(DualMixin, SFTTrainer):
    pass

folder = Path(sys.argv[1])
scored = score_dataset(tiny_llama(1), documents(), cache_dir=folder)
words = Tokenizer(models.WordLevel({str(token): token for token in range(128)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")

def losses(trainer):
    trainer.train()
    plain = trainer.evaluate()["eval_loss"]
    return [line["loss/dual"] for line in trainer.state.log_history if "loss/dual" in line] + [plain]

def settings(**changes):
    known = arguments(folder, max_steps=4, gradient_accumulation_steps=2)
    names = ("output_dir", "max_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "logging_steps",
             "per_device_eval_batch_size", "learning_rate", "report_to", "use_cpu", "save_strategy", "disable_tqdm",
             "train_sampling_strategy", "max_grad_norm")
    return SFTConfig(**{name: getattr(known, name) for name in names}, bf16=False, activation_checkpointing=False,
                     **changes)

def sft(data, **changes):
    return DualSFTTrainer(tiny_llama(2), settings(**changes), train_dataset=data, eval_dataset=data.select(range(9)),
                          processing_class=tokenizer)

def own(data):
    known = arguments(folder, max_steps=4, gradient_accumulation_steps=2)
    return DualTrainer(tiny_llama(2), known, train_dataset=data, eval_dataset=data.select(range(9)))

found = {"sft": losses(sft(scored)), "own": losses(own(scored)), "refused": []}
for changes in ({"packing": True}, {"loss_type": "dft"}, {"max_length": 16}):
    try:
        sft(scored, **changes).train()
    except DualtokError as error:
        found["refused"].append(str(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not TRL.is_dir():
        pytest.fail("build/trl is not there: run `make test-peers`")
    folder: Path = tmp_path_factory.mktemp("trl")
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder)],
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
        env=environment(PYTHONPATH=f"{TRL}:{ROOT}", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""),
        cwd="/",
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answer: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return answer


def test_trls_trainer_gives_the_losses_of_the_dual_trainer(found: dict[str, Any]) -> None:
    assert len(found["sft"]) == 5
    assert found["sft"] == pytest.approx(found["own"], rel=1e-5)


def test_what_trl_would_do_to_the_tokens_is_refused(found: dict[str, Any]) -> None:
    packing, dft, cut = found["refused"]
    assert "use DualCollator(pack_to=...)" in packing
    assert "loss_type: dft" in dft
    assert re.search("16 input_ids and [0-9]+ values of reference_loss; run score_dataset again", cut)
