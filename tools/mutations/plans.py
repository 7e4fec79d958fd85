"""Faults in what is said before a run: what it is expected to gain and to give away."""

from __future__ import annotations

from mutations.fault import Fault

LEAK, SAID = "dualtok/plan/leak.py", "dualtok/commands/plan/leak.py"
OF_LEAK, OF_SAID = ("tests/plan/test_leak.py",), ("tests/commands/plan/test_leak.py",)

PLANS: tuple[Fault, ...] = (
    Fault(
        "leak-without-floor",
        LEAK,
        "math.hypot(power, floor) / math.sqrt(2)",
        "power / math.sqrt(2)",
        "the strongest of many attacks on nothing is expected at .5",
        OF_LEAK,
    ),
    Fault(
        "leak-interval-one-sided",
        LEAK,
        "inv_cdf((1 + LEVEL) / 2)",
        "inv_cdf(LEVEL)",
        "an interval holds fewer errors than it says",
        OF_LEAK,
    ),
    Fault(
        "leak-verdict-by-the-mean",
        LEAK,
        "if said.auc.high <= QUIET:",
        "if said.auc.value <= QUIET:",
        "a run that may leak is called quiet",
        OF_LEAK,
    ),
    Fault(
        "leak-outside-passes",
        LEAK,
        "if not _inside(value, known.ranges[name])",
        "if False",
        "a run that nothing was measured of is predicted without a word",
        OF_LEAK,
    ),
    Fault(
        "leak-auxiliary-not-counted",
        "dualtok/commands/plan/inputs.py",
        "documents for name in AUXILIARY if name in manifest.splits",
        'documents for name in ("reference",) if name in manifest.splits',
        "the auxiliary split is not counted",
        OF_SAID,
    ),
    Fault(
        "leak-steps-as-epochs",
        SAID,
        "epochs = train.steps * train.batch_size / material.blocks",
        "epochs = train.steps",
        "steps are taken for epochs",
        OF_SAID,
    ),
    Fault(
        "leak-references-warned-about",
        SAID,
        'if train.engine == "opacus" or train.split in AUXILIARY:',
        'if train.engine == "opacus":',
        "training a reference is warned about",
        OF_SAID,
    ),
)
