"""The faults that ``tools/mutation_check.py`` seeds, by the part of the package that they are in."""

from __future__ import annotations

from mutations.audit import AUDIT
from mutations.borders import BORDERS
from mutations.data import DATA
from mutations.fault import Fault
from mutations.front import FRONT
from mutations.objective import OBJECTIVE
from mutations.plumbing import PLUMBING

__all__ = ["FAULTS", "Fault"]

FAULTS: tuple[Fault, ...] = (*OBJECTIVE, *DATA, *AUDIT, *PLUMBING, *BORDERS, *FRONT)
