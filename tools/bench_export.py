"""Memory that ``dualtok export`` needs for a checkpoint of many parameters: its peak must not grow with the model.

Writes a checkpoint of random parameters in pieces of two ranks, exports it in a process of its own, and prints the
growth of resident memory over the libraries' beside the bound: twice the largest parameter and 1 GiB.

    python tools/bench_export.py [--parameters 24] [--mebibytes 64]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dualtok.train.checkpoints.files import finalize, write_part
from dualtok.train.checkpoints.manifest import tag_of
from dualtok.train.checkpoints.writer import point
from dualtok.train.engines.states import KINDS, ParameterSlice

if TYPE_CHECKING:
    from collections.abc import Iterator

RANKS = 2
EXPORT = """
import resource, sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from dualtok.commands.export import export
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")
export(Path(sys.argv[1]), Path(sys.argv[2]), which="latest")
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(peak * 1024 - before)
"""


def main() -> None:
    """Write, export, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=24)
    parser.add_argument("--mebibytes", type=int, default=64, help="of each parameter's float32 weight")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_checkpoint(run, options.parameters, options.mebibytes)
        command = [sys.executable, "-c", EXPORT, str(run), str(Path(folder) / "model")]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    largest, whole = options.mebibytes / 1024, options.parameters * options.mebibytes / 1024
    print(
        f"weights {whole:.2f} GiB, largest parameter {largest:.3f} GiB: export grew by {grown / 2**30:.2f} GiB, "
        f"bound {2 * largest + 1:.2f} GiB"
    )


def write_checkpoint(run: Path, parameters: int, mebibytes: int) -> None:
    """Write a run's folder with one complete checkpoint."""
    (run / "start").mkdir(parents=True)
    (run / "start" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (run / "run.yaml").write_text("objective: causal_lm\nmodel: {path: null}\n")
    folder = run / "checkpoints" / tag_of(1)
    folder.mkdir(parents=True)
    for rank in range(RANKS):
        write_part(folder, rank, pieces(rank, parameters, mebibytes * 2**18))
    finalize(folder, ranks=RANKS, step=1, optimizer_steps=1, layout="", state={}, run={})
    point(folder.parent, "latest", folder.name)


def pieces(rank: int, parameters: int, size: int) -> Iterator[ParameterSlice]:
    """Yield one rank's half of every parameter."""
    half = size // RANKS
    for number in range(parameters):
        yield ParameterSlice(f"layer.{number}.weight", (size,), rank * half, {kind: torch.rand(half) for kind in KINDS})


if __name__ == "__main__":
    main()
