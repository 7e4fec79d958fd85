"""Time `dualtok audit --model` on two lists of texts beside the bare forward passes over the same texts, in turns.

    python tools/bench_audit_texts.py --model MODEL --members A.jsonl --non-members B.jsonl [--pairs 3]

Prints the seconds of the whole command, of the bare passes (by a process that has loaded the model before), and what
the command takes beyond them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [tokenizer(json.loads(line)["text"])["input_ids"] for file in sys.argv[2:] for line in open(file)]
with torch.no_grad():
    model(input_ids=torch.tensor([rows[0]]))
    started = time.monotonic()
    for row in rows:
        model(input_ids=torch.tensor([row]))
print(time.monotonic() - started)
"""


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--members", required=True)
    parser.add_argument("--non-members", required=True)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    bare, whole, found = [], [], ""
    for pair in range(options.pairs):
        bare.append(bare_seconds(options))
        seconds, found = audit_seconds(options)
        whole.append(seconds)
        print(f"pair {pair + 1}: bare passes {bare[-1]:.1f} s, the command {whole[-1]:.1f} s", flush=True)
    beyond = [one - other for one, other in zip(whole, bare, strict=True)]
    print(
        f"median: bare passes {statistics.median(bare):.1f} s, the command {statistics.median(whole):.1f} s, "
        f"beyond {statistics.median(beyond):.1f} s; strongest attack {found}"
    )


def bare_seconds(options: argparse.Namespace) -> float:
    """Return the seconds of the model's forward passes, one text at a time."""
    command = [sys.executable, "-c", BARE, options.model, options.members, options.non_members]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def audit_seconds(options: argparse.Namespace) -> tuple[float, str]:
    """Return the seconds of the command in a new folder, and the strongest attack's figure."""
    with tempfile.TemporaryDirectory() as folder:
        lists = ["--members", options.members, "--non-members", options.non_members]
        command = [sys.executable, "-m", "dualtok", "audit", "--model", f"m={options.model}", *lists, "--out", folder]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        (row,) = json.loads((Path(folder) / "audit" / "audit.json").read_text(encoding="utf-8"))["models"]
    return seconds, f"{row['strongest']['label']} {row['strongest']['auc_two_sided']['value']:.3f}"


if __name__ == "__main__":
    main()
