"""Token losses and gradients under torch's FSDP on two ranks; accelerate itself uses it on accelerators alone."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import torch

from dualtok.integrations.transformers import score_dataset
from tests.integrations.transformers.support import documents, dual_oracle, tiny_llama
from tests.support import ROOT, command, environment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_fsdp_gives_the_loss_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    scored = score_dataset(tiny_llama(1), documents(), cache_dir=tmp_path / "cache")
    scored.save_to_disk(str(tmp_path / "data"))
    model = tiny_llama(2)
    model.save_pretrained(tmp_path / "start")
    job = command("tests.integrations.transformers.fsdp_worker", tmp_path, ranks=2)
    done = subprocess.run(job, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, _ = dual_oracle(model, list(scored.select(range(8))))
    loss.backward()
    known = {name: p.grad for name, p in model.named_parameters()}
    for version, (found_loss, gradients) in torch.load(tmp_path / "found.pt", weights_only=True).items():
        assert found_loss == pytest.approx(float(loss.detach()), rel=1e-5), version
        assert gradients.keys() == known.keys(), version
        for name, gradient in known.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
