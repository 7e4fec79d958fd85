"""How often an audit finds something where there is nothing to find, over simulated audits.

    python tools/check_null.py [--audits 400] [--documents 100] [--tokens 60]

Members and non-members are drawn from one distribution. All attacks run that one pass is enough for, those of later
versions too, as long as the made-up signals have what they need; the others are named. Prints the share of audits in
which the two-sided interval of the strongest attack lies above .5, that of p-values of at most .05, and that of audits
in which the power's AUC was exceeded. Ends with 1 if the first share is above 5 %.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import scipy.stats
from synthetic_signals import audited_classes

from dualtok.audit.settings import AuditConfig
from dualtok.audit.statistics.evaluate import audit_model

MOST = 0.05


def main() -> int:
    """Simulate the audits and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=400)
    parser.add_argument("--documents", type=int, default=100, help="members, and non-members")
    parser.add_argument("--tokens", type=int, default=60, help="mean length of a document")
    options = parser.parse_args()
    found: dict[str, list[bool]] = {"interval above .5": [], "p-value at most .05": [], "AUC beyond the power's": []}
    collections: list[float] = []
    for number in range(options.audits):
        (members, known), (others, known_others) = audited_classes(
            options.documents, tokens=options.tokens, seed=number, leak=0.0
        )
        config = replace(AuditConfig(), seed=number)
        row = audit_model(
            "nothing", members, others, member_context=known, non_member_context=known_others, config=config
        )
        best = row.strongest.auc_two_sided
        assert row.strongest_p_value is not None
        assert row.power is not None
        outcome = best.low > 0.5, row.strongest_p_value <= MOST, best.value > row.power.auc
        for name, value in zip(found, outcome, strict=True):
            found[name].append(value)
        collections += [test.p_value for test in row.collections]
    print(f"{len(row.attacks)} attacks: {', '.join(result.label for result in row.attacks)}")
    print(f"not run: {row.not_run}")
    for name, values in found.items():
        test = scipy.stats.binomtest(sum(values), len(values))
        ends = test.proportion_ci(method="exact")
        print(f"{name}: {sum(values)} of {len(values)} audits = {test.statistic:.3f} [{ends.low:.3f}, {ends.high:.3f}]")
    if collections:
        print(f"collections with p of at most .05: {np.mean(np.array(collections) <= MOST):.3f} of {len(collections)}")
    return int(np.mean(found["interval above .5"]) > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
