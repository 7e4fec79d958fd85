"""The faults that ``tools/mutation_check.py`` seeds, by the part of the package that they are in."""

from __future__ import annotations

from mutations.audit import AUDIT
from mutations.borders import BORDERS
from mutations.chat import CONVERSATIONS
from mutations.data import DATA
from mutations.fault import Fault
from mutations.front import FRONT
from mutations.integrations import INTEGRATIONS
from mutations.objective import OBJECTIVE
from mutations.plans import PLANS
from mutations.plumbing import PLUMBING

__all__ = ["FAULTS", "Fault"]

FAULTS: tuple[Fault, ...] = (
    *OBJECTIVE,
    *DATA,
    *CONVERSATIONS,
    *AUDIT,
    *PLUMBING,
    *PLANS,
    *BORDERS,
    *INTEGRATIONS,
    *FRONT,
)
