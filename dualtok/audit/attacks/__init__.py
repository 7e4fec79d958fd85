"""Attacks: each gives one score per document, higher = member.

Importing a module enters its attacks into :data:`.base.ATTACKS`; this is their order in settings and tables.
"""

# isort: off
from dualtok.audit.attacks import single_pass as single_pass
from dualtok.audit.attacks import token_level as token_level
from dualtok.audit.attacks import rerun as rerun
from dualtok.audit.attacks import adaptive as adaptive
from dualtok.audit.attacks import rmia as rmia
from dualtok.audit.attacks import lira as lira
from dualtok.audit.attacks import learned as learned
# isort: on
