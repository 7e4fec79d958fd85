"""Campaigns of faults for as long as asked: ``python -m tests.faults.soak --minutes 60`` (``make soak MINUTES=60``)."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness import KINDS, Campaign
from tests.support import write_small_corpus

FAULTS = 5
"""Of each campaign."""
LOCAL = tuple(kind for kind in KINDS if kind != "remote")


def main() -> None:
    """Run campaigns, one seed after the other, and count what they survived; the first failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--faults", type=int, default=None, help="end after so many faults instead")
    parser.add_argument("--seed", type=int, default=100, help="of the first campaign")
    options = parser.parse_args()
    started, struck, seed = time.monotonic(), Counter[str](), options.seed
    with tempfile.TemporaryDirectory() as scratch:
        data = write_small_corpus(Path(scratch))
        while True:
            # Every other campaign trains from an object store, at fault half of the time.
            kinds = (*KINDS, "remote", "remote", "remote") if seed % 2 else LOCAL
            campaign = Campaign(Path(scratch) / f"seed-{seed}", data, seed, FAULTS, kinds)
            campaign.carry_out()
            struck.update(line.split()[2] for line in campaign.log)  # "fault 3: kill at step 7"
            minutes = (time.monotonic() - started) / 60
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items()))
            print(
                f"seed {seed}: {struck.total()} faults in {minutes:.1f} min ({counts}); every run ended as the "
                "undisturbed one",
                flush=True,
            )
            done = struck.total() >= options.faults if options.faults else minutes >= options.minutes
            if done:
                return
            seed += 1


if __name__ == "__main__":
    main()
