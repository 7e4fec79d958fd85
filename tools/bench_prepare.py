"""Cost of ``dualtok prepare`` by size of the corpus: seconds per MB, peak memory and disk, each size in a new process.

The text is synthetic: words of realistic lengths, drawn by Zipf's law, in documents of about 2 kB, some of which are
exact or near duplicates of earlier ones. A size is prepared with two processes, near duplicates sought and a tokenizer
trained. A first, tiny corpus tells what starting costs.

    python tools/bench_prepare.py --to 100
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import yaml

from dualtok.data.manifest import load_manifest
from dualtok.data.prepare.pipeline import STAGING
from dualtok.data.sources.corpora import write_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (10, 30, 100, 300, 1000)
START_MB = 0.3
MB = 1e6
TERABYTE_MB = 1e6
PROCESSES = 2
VOCABULARY = 50_000
EXACT, NEAR = 0.03, 0.03
"""Shares of documents that repeat an earlier one, as it is or with one word changed."""
REMEMBERED = 2000
POLL_SECONDS = 0.1
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
LETTER_WEIGHTS = np.array([12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])
WORD_LENGTHS = np.array([3, 17, 21, 16, 11, 9, 8, 6, 4, 3, 2])
"""Of words of 1, 2, ... letters in English text, in percent."""


class Measured(NamedTuple):
    """One preparation."""

    megabytes: float
    documents: int
    seconds: float
    cpu_seconds: float
    """Of all its processes: what a busy machine changes least."""
    main_mib: float
    worker_mib: float
    """The largest worker's."""
    index_bytes: int
    staging_bytes: int


def texts(megabytes: float, seed: int) -> Iterator[str]:
    """Yield documents of about so many MB together."""
    draw = np.random.default_rng(seed)
    lengths = draw.choice(np.arange(1, 12), size=VOCABULARY, p=WORD_LENGTHS / WORD_LENGTHS.sum())
    letters = list(LETTERS)
    weights = LETTER_WEIGHTS / LETTER_WEIGHTS.sum()
    words = np.array(["".join(draw.choice(letters, size=length, p=weights)) for length in lengths], dtype=object)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    cumulative = np.cumsum(frequency / frequency.sum())
    earlier: list[list[str]] = []
    left = megabytes * MB
    while left > 0:
        kind = draw.random() if earlier else 1.0
        if kind < EXACT + NEAR:
            document = list(earlier[int(draw.integers(len(earlier)))])
            if kind < NEAR:
                document[int(draw.integers(len(document)))] = f"changed{draw.integers(10**9)}"
        else:
            count = int(np.clip(draw.lognormal(mean=5.5, sigma=0.7), 20, 20_000))
            document = words[np.minimum(np.searchsorted(cumulative, draw.random(count)), VOCABULARY - 1)].tolist()
            if len(earlier) < REMEMBERED:
                earlier.append(document)
            else:
                earlier[int(draw.integers(REMEMBERED))] = document
        text = " ".join(document)
        left -= len(text)
        yield text


def measure(megabytes: float, folder: Path) -> Measured:
    """Prepare a corpus of so many MB in a fresh process and watch it."""
    source, target = folder / "texts.jsonl", folder / "prepared"
    write_jsonl(texts(megabytes, seed=0), source)
    run = folder / "run.yaml"
    data = {"dir": str(target), "source": str(source), "processes": PROCESSES}
    run.write_text(yaml.safe_dump({"data": data, "output_dir": str(folder / "out")}), encoding="utf-8")
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "dualtok", "prepare", str(run)], stdout=subprocess.DEVNULL)
    main = worker = index = staging = 0
    looked = 0.0
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        main = max(main, _peak_kib(process.pid))
        worker = max([worker, *map(_peak_kib, _children(process.pid))])
        if time.perf_counter() - looked > 10 * POLL_SECONDS:
            sizes = _sizes(target / STAGING)
            index = max(index, sum(size for name, size in sizes.items() if re.match(r"keys-|groups-", name)))
            staging = max(staging, sum(sizes.values()))
            looked = time.perf_counter()
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise SystemExit(f"dualtok prepare ended with status {process.returncode}")
    cpu = ended[2].ru_utime + ended[2].ru_stime
    documents = load_manifest(target).documents_read
    return Measured(source.stat().st_size / MB, documents, seconds, cpu, main / 1024, worker / 1024, index, staging)


def _peak_kib(pid: int) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:  # it has just ended
        return 0
    return int(found[1]) if found else 0


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes[path.name] = path.stat().st_size
        except OSError:  # a temporary file that has got its name meanwhile
            continue
    return sizes


def report(start: Measured, results: list[Measured]) -> str:
    """Return the table, the slopes and the extrapolation."""
    lines = [
        f"start: {start.seconds:.1f} s, {start.cpu_seconds:.1f} s of processors for {start.megabytes:.1f} MB "
        "(subtracted in the columns per MB)",
        "| MB | documents | s | processors' s | s/MB | processors' s/MB | peak MiB, main | peak MiB, worker "
        "| index bytes/document | staging/text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        wall, cpu = one.seconds - start.seconds, one.cpu_seconds - start.cpu_seconds
        lines.append(
            f"| {one.megabytes:.0f} | {one.documents:,} | {one.seconds:.1f} | {one.cpu_seconds:.1f} | "
            f"{wall / one.megabytes:.3f} | {cpu / one.megabytes:.3f} | {one.main_mib:.0f} | {one.worker_mib:.0f} | "
            f"{one.index_bytes / one.documents:.0f} | {one.staging_bytes / MB / one.megabytes:.2f} |"
        )
    if len(results) > 1:
        size = np.log([one.megabytes for one in results])
        wall_slope, cpu_slope = (
            np.polyfit(size, np.log([max(1e-3, cost - own) for cost in costs]), 1)[0]
            for costs, own in (
                ([one.seconds for one in results], start.seconds),
                ([one.cpu_seconds for one in results], start.cpu_seconds),
            )
        )
        last, before = results[-1], results[-2]
        marginal = (last.cpu_seconds - before.cpu_seconds) / (last.megabytes - before.megabytes)
        days = marginal * TERABYTE_MB / 86_400
        lines += [
            f"log-log slope: processors {cpu_slope:.3f}, elapsed {wall_slope:.3f} (1.0 = linear)",
            f"1 TB at the last interval's {marginal:.3f} processor-seconds per MB: {days:.1f} processor-days, if disks "
            "keep up and every stage stays linear; one process decides on each document, trains the tokenizer and "
            "checks the shards",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure the sizes up to ``--to`` and print the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=float, default=100, help="largest corpus, MB")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    results: list[Measured] = []
    for megabytes in (START_MB, *(size for size in SIZES if size <= arguments.to)):
        folder = Path(tempfile.mkdtemp(prefix="bench-prepare-", dir=arguments.folder))
        try:
            results.append(measure(megabytes, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(results[-1]._asdict()), flush=True)
    print(report(results[0], results[1:]))


if __name__ == "__main__":
    main()
