#!/bin/bash
# transformers 5.23.0 with tokenizers 0.23.3: a fast tokenizer converted from a SentencePiece unigram model takes a control
# piece that a text spells out for the piece itself, also under split_special_tokens=True; sentencepiece 0.2.3 never does.
#
# Input: a unigram model of a thousand pieces, and the text "a <s> b".
# Seen: sentencepiece ['▁a', '▁', '<', 's', '>', '▁b'], the converted tokenizer ['a', '▁', '<s>', '▁b'] (without the
# normaliser that puts a space in front).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import random

import sentencepiece
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

draw = random.Random(0)
words = ["".join(draw.choices("abdefgiklmnoprstuv", k=draw.randint(2, 8))) for _ in range(2000)]
texts = [" ".join(draw.choices(words, k=12)) for _ in range(3000)]
sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix="unigram", vocab_size=400, minloglevel=2)
own = sentencepiece.SentencePieceProcessor(model_file="unigram.model")
extractor = SentencePieceExtractor("unigram.model")
parts = extractor.extract(None)
backend = SpmConverter.build_tokenizer_from_spm_proto(extractor.proto, parts["vocab"], parts.get("merges"))
fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
text = "a <s> b"
theirs = fast.convert_ids_to_tokens(fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
print("sentencepiece", own.encode(text, out_type=str))
print("transformers ", theirs)
assert own.bos_id() not in own.encode(text)
assert "<s>" in theirs, "the behaviour has changed"
PYTHON
