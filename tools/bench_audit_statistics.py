"""What attacks and statistics cost after the model passes, on made-up signals.

    python tools/bench_audit_statistics.py --baseline ../dualtok-before [--pairs 5] [--models 8] [--documents 836]

times this checkout against another one, in turns, each turn in a process of its own: the processor time (user and
system, all threads) of auditing so many models by fifteen attacks that one pass is enough for.

    python tools/bench_audit_statistics.py --scale [--documents 10000 100000 1000000] [--tokens 32]

writes the signals of so many documents, half of them members, as files, and audits them part by part: seconds,
processor time and the greatest resident memory of the auditing process. Up to MOST_DRAWN documents all resamples and
permutations are drawn; beyond, figures come from their laws (docs/audit.md).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthetic_signals import audited_classes, context_of, parts

from dualtok.audit.settings import AuditConfig
from dualtok.audit.signals.files import Ragged, joined, write_ragged
from dualtok.audit.signals.signals import TOKEN_DTYPES, Signals
from dualtok.audit.statistics.evaluate import audit_model

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("members", "non_members")
ATTACKS = (
    *("loss", "ref", "zlib", "min_k", "min_k_plus_plus", "surp", "dc_pdd", "wbc", "error_zone"),
    *("ref_distance", "above_share", "above_mean", "above_tail", "ref_classifier", "ref_forest"),
)
"""The same fifteen for both checkouts, whatever else either has."""


def main() -> None:
    """Compare two checkouts, or measure how the cost grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--scale", action="store_true", help="measure growth instead")
    parser.add_argument("--documents", type=int, nargs="+", help="of each class (--baseline), or of both (--scale)")
    parser.add_argument("--tokens", type=int, help="mean length of a document")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--turn", choices=("models", "write", "stream"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.documents = options.documents or ([10**4, 10**5, 10**6] if options.scale else [836])
    options.tokens = options.tokens or (32 if options.scale else 100)
    if options.turn:
        turns = {"models": audit_models, "write": write_signals, "stream": audit_files}
        print(json.dumps(turns[options.turn](options)))
    elif options.scale:
        growth(options)
    elif options.baseline:
        comparison(options)
    else:
        parser.error("give --baseline PATH or --scale")


def comparison(options: argparse.Namespace) -> None:
    """Print the ratio of both checkouts' processor times."""
    from benchmark_support import paired, print_ratio  # torch, which a turn need not load

    def turn(checkout: Path) -> float:
        seconds: float = child("models", options, checkout)["processor"]
        return seconds

    now, before = paired(lambda: turn(ROOT), lambda: turn(options.baseline), options.pairs)
    label = (
        f"{options.models} models, {options.documents[0]} + {options.documents[0]} documents of {options.tokens} tokens"
    )
    print_ratio(f"{label}: attacks and statistics, now / before", now, before, "s of processor time")


def growth(options: argparse.Namespace) -> None:
    """Print a line for each number of documents."""
    for documents in options.documents:
        with tempfile.TemporaryDirectory() as folder:
            at = ["--documents", str(documents), "--folder", folder]
            child("write", options, ROOT, at)
            found = child("stream", options, ROOT, at)
        print(
            f"{documents:,} documents: {found['seconds']:.1f} s, {found['processor']:.1f} s of processor time, "
            f"{found['gib']:.2f} GiB, {found['attacks']} attacks, {found['collections']} collections, "
            f"strongest {found['strongest']}",
            flush=True,
        )


def child(turn: str, options: argparse.Namespace, checkout: Path, more: list[str] | None = None) -> dict[str, Any]:
    """Run a turn in a process of its own, with the package of a checkout, and return what it found."""
    command = [sys.executable, __file__, "--turn", turn, "--models", str(options.models)]
    command += ["--tokens", str(options.tokens), *(more or ["--documents", str(options.documents[0])])]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def audit_models(options: argparse.Namespace) -> dict[str, float]:
    """Return the processor time of auditing models, signals and imports apart."""
    documents, total = options.documents[0], 0.0
    for number in range(-1, options.models):  # the first is a warm-up
        size = documents if number >= 0 else 40
        (members, known), (others, known_others) = audited_classes(size, tokens=options.tokens, seed=number + 1)
        started = time.process_time()
        contexts = {"member_context": known, "non_member_context": known_others}
        audit_model("model", members, others, config=AuditConfig(attacks=ATTACKS), **contexts)
        total += time.process_time() - started if number >= 0 else 0.0
    return {"processor": total}


def write_signals(options: argparse.Namespace) -> dict[str, float]:
    """Write the signals of model and reference over both classes."""
    for kind in CLASSES:
        made: tuple[list[Ragged], list[Ragged]] = ([], [])
        for signals, context in parts(options.documents[0] // 2, members=kind == "members", tokens=options.tokens):
            assert context.reference is not None
            for kept, one in zip(made, (signals, context.reference), strict=True):
                values = {name: getattr(one, name) for name in TOKEN_DTYPES}
                kept.append(Ragged(one.document, one.offsets, values))
        for kept, name in zip(made, ("model", "reference"), strict=True):
            write_ragged(options.folder / f"{name}-{kind}.parquet", joined(kept, TOKEN_DTYPES))
    return {}


def audit_files(options: argparse.Namespace) -> dict[str, Any]:
    """Audit the files, and return seconds, processor time and the process's greatest resident memory."""
    from dualtok.audit.statistics.evaluate import audit_parts  # the other checkout of a comparison may not have it

    def read(kind: str) -> Iterator[Any]:
        files = [options.folder / f"{name}-{kind}.parquet" for name in ("model", "reference")]
        for signals, reference in Signals.stream_pairs(*files):
            yield signals, context_of(signals, reference)

    started, processor = time.perf_counter(), time.process_time()
    row = audit_parts("model", *(read(kind) for kind in CLASSES), config=AuditConfig())
    best = row.strongest.auc_two_sided
    return {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - processor,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "attacks": len(row.attacks),
        "collections": len(row.collections),
        "strongest": f"{row.strongest.label} {best.value:.4f} [{best.low:.4f}, {best.high:.4f}]",
    }


if __name__ == "__main__":
    main()
