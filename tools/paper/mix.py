"""A model between two others: start + w (end - start), as a Hugging Face folder.

python tools/paper/mix.py START END W TARGET
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dualtok.model.folder.interpolate import write_interpolation


def main() -> None:
    """Write the model; one that is there is replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("end", type=Path)
    parser.add_argument("w", type=float)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    write_interpolation(options.start, options.end, options.w, options.target)


if __name__ == "__main__":
    main()
