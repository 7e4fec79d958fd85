#!/bin/bash
# transformers 4.57.6 reads a Llama that transformers 5.23.0 has saved with the default rope_theta, whatever it was, without
# a warning; and refuses the tokenizer beside it for a class of that name.
#
# Input: a LlamaConfig with rope_theta 500,000, and a fast tokenizer, each saved by 5.23.0's save_pretrained.
# Seen: 4.57.6 gives rope_theta 10000.0, and "Tokenizer class TokenizersBackend does not exist or is not currently imported".
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.6; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "transformers==$version"
done
cd "$work"
export HF_HUB_OFFLINE=1
5.23.0/bin/python - <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

LlamaConfig(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}).save_pretrained("saved")
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>").save_pretrained("saved")
PYTHON
4.57.6/bin/python - <<'PYTHON'
from transformers import AutoConfig, AutoTokenizer

theta = AutoConfig.from_pretrained("saved").rope_theta
try:
    AutoTokenizer.from_pretrained("saved")
    said = ""
except ValueError as error:
    said = str(error)
print("rope_theta", theta, "| tokenizer:", said)
assert theta == 10000.0, "the behaviour has changed"
assert "TokenizersBackend" in said, "the behaviour has changed"
PYTHON
