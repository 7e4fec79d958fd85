"""Faults in the front door: run files, `dualtok run`, `dualtok init`, and the schema."""

from __future__ import annotations

from mutations.fault import Fault

MARKS, WAY = "dualtok/commands/run/marks.py", "dualtok/commands/run/way.py"
OF_INIT, OF_MARKS = (
    ("tests/commands/init/test_init.py::test_the_layout_is_planned_and_lora_chosen_where_all_weights_do_not_fit",),
    ("tests/commands/run/test_marks.py",),
)
OF_SCHEMA, OF_WAY = (
    ("tests/commands/settings/test_schema.py::test_an_audit_of_texts_needs_no_data",),
    ("tests/commands/run/test_way.py",),
)

FRONT: tuple[Fault, ...] = (
    Fault(
        "inputs-not-compared",
        MARKS,
        "        if earlier.inputs[name] != now.inputs[name]:\n",
        "        if False:\n",
        "a model stays done when what it was trained from is another one",
        OF_MARKS,
    ),
    Fault(
        "training-replaced-unasked",
        MARKS,
        '    return step.verb in ("train", "prepare")\n',
        '    return step.verb == "prepare"\n',
        "a training run of other settings is put aside without being asked",
        OF_MARKS,
    ),
    Fault(
        "training-looks-the-same",
        MARKS,
        "        return secrets.token_hex(8)\n",
        '        return "trained"\n',
        "what was made from a model counts when the model is trained again",
        OF_MARKS,
    ),
    Fault(
        "attacker-trained-as-reference",
        WAY,
        'self._given("attack_reference")',
        'self._given("reference")',
        "the attacker's reference has the settings of the defender's",
        OF_WAY,
    ),
    Fault(
        "reference-not-scored-for",
        WAY,
        "{**start, **reference}, needs)",
        "{**start}, needs)",
        "the model is trained without the reference that was made for it",
        OF_WAY,
    ),
    Fault(
        "schema-wants-data",
        "dualtok/config/describe/schema.py",
        '"anyOf": DATA_OR_TEXTS',
        '"anyOf": DATA_OR_TEXTS[:1]',
        "an editor marks an audit of texts, which needs no data",
        OF_SCHEMA,
    ),
    Fault(
        "states-in-files-chosen",
        "dualtok/commands/init/choose.py",
        "option.fits and not _uses_files(option)",
        "option.fits",
        "dualtok init chooses a layout that cannot be resumed",
        OF_INIT,
    ),
)
