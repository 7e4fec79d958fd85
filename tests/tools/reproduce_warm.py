"""tools/reproduce_paper.py, except that ``DUALTOK_LAUNCHER`` starts its commands (see :mod:`tests.warm`)."""

from __future__ import annotations

import os
import shlex
import sys

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import reproduce_paper
from paper import steps

if __name__ == "__main__":
    steps.DUALTOK[:] = shlex.split(os.environ["DUALTOK_LAUNCHER"])
    reproduce_paper.main()
