#!/bin/bash
# datasets 5.2.0: one value that is no text, beyond the first 10 MB of a JSON lines file, turns every text of that chunk
# into its JSON source, without a warning.
#
# Input: 8,000 lines {"text": "row N xxx..."} of 3 kB, where line 6,000 holds {"text": 7}.
# Seen: the rows of the chunk that holds line 6,000 come back with quotation marks of JSON around them, e.g.
#   '"row 5000 xxx' instead of 'row 5000 xxx'; those before it are as they were. `on_mixed_types=None` raises instead.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet datasets==5.2.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import json

from datasets import load_dataset

lines = [json.dumps({"text": f"row {number} " + "x" * 3000}) for number in range(8000)]
lines[6000] = '{"text": 7}'
open("train.jsonl", "w").write("\n".join(lines) + "\n")
rows = [row["text"] for row in load_dataset("json", data_files="train.jsonl", split="train", streaming=True)]
quoted = [number for number, text in enumerate(rows) if text.startswith('"row')]
print(f"{len(rows)} rows, {len(quoted)} of them JSON source, from row {quoted[0] if quoted else None} on: {rows[quoted[0]][:12] if quoted else ''}")
assert rows[0].startswith("row 0 "), "the first chunk is as it was"
assert len(quoted) > 1000, "the behaviour has changed"
PYTHON
