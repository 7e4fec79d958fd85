"""A prepared folder with some documents of one split, and all of another.

    python tools/paper/subset.py DATA SPLIT TARGET --of train --times 1        # for an attacker who has no more
    python tools/paper/subset.py DATA train TARGET --fold 0 8 --with held_out  # what a second release has learned anew

Takes at random as many documents of SPLIT as ``--times`` the split ``--of`` has, or all if there are no more; or those
of one fold of ``train.leave_out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dualtok.data.folder import DataFolder
from dualtok.data.folds import fold_of
from dualtok.data.subset import Subset, is_written, write_subset


def main() -> None:
    """Write the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("split")
    parser.add_argument("target", type=Path)
    parser.add_argument("--of", help="split that decides how many")
    parser.add_argument("--times", type=float)
    parser.add_argument("--fold", type=int, nargs=2, metavar=("FOLD", "FOLDS"))
    parser.add_argument("--with", dest="whole", default="validation", help="split that is taken whole")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.fold is None) == (options.of is None or options.times is None):
        parser.error("give --of and --times, or --fold")
    if is_written(options.target):
        return
    data = DataFolder(str(options.data))
    ids = np.sort(data.documents(options.split)["doc"].to_numpy())
    if options.fold is not None:
        fold, folds = options.fold
        taken = ids[fold_of(ids, folds) == fold]
    else:
        count = min(len(ids), max(1, round(options.times * data.manifest.splits[options.of].documents)))
        taken = np.random.default_rng(options.seed).choice(ids, count, replace=False)
    write_subset(
        data,
        options.target,
        {
            options.split: Subset((options.split,), lambda documents: np.isin(documents, taken)),
            options.whole: Subset((options.whole,), lambda documents: np.ones(len(documents), dtype=bool)),
        },
        rows_per_shard=int(data.manifest.config["rows_per_shard"]),
        note={"documents_of": options.split, "seed_of_documents": options.seed},
    )


if __name__ == "__main__":
    main()
