"""What the map predicts of a run, from its settings and its data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dualtok.commands.plan.inputs import AUXILIARY, material_of
from dualtok.errors import ConfigError
from dualtok.plan.leak import expect, load_map, measured_ranges

if TYPE_CHECKING:
    from dualtok.commands.plan.inputs import Material
    from dualtok.config.run import RunConfig
    from dualtok.plan.leak import Expected


def with_documents(material: Material, documents: int | None, auxiliary: int | None) -> Material:
    """Return the material with the documents that the command line names, where the data is not prepared.

    Raises:
        ConfigError: it is prepared, which says how many there are; or auxiliary documents are given alone.
    """
    given = [name for name, count in (("--documents", documents), ("--auxiliary", auxiliary)) if count is not None]
    if given and material.documents is not None:
        raise ConfigError(f"{given[0]}: the data is prepared, which says how many documents there are; leave it out")
    if given == ["--auxiliary"]:
        raise ConfigError("--auxiliary: has no effect without --documents, the private ones")
    return replace(material, documents=documents, auxiliary=auxiliary or 0) if given else material


def expected_of(run: RunConfig, material: Material) -> Expected | None:
    """Return what a run is expected to gain and to give away; None where its documents or epochs are not known."""
    train = run.train
    assert train is not None
    epochs = train.epochs
    if epochs is None and train.steps is not None and material.blocks is not None:
        epochs = train.steps * train.batch_size / material.blocks
    if not material.documents or not epochs:
        return None
    return expect(
        load_map(),
        documents=material.documents,
        epochs=epochs,
        auxiliary=material.auxiliary,
        parameters=material.shape.parameters,
    )


def warning_of(run: RunConfig) -> str | None:
    """Return what to say before a run on prepared data that the map says nothing about; None where it does.

    Runs that make references are left alone, and DP-SGD, which has its own account; so are models whose shape no
    configuration tells.
    """
    train = run.train
    assert train is not None
    if train.engine == "opacus" or train.split in AUXILIARY:
        return None
    try:
        expected = expected_of(run, material_of(run))
    except ConfigError:
        return None
    if expected is None or not expected.outside:
        return None
    return (
        f"this run is outside of what was measured ({measured_ranges(load_map(), expected)}): nobody can say what it "
        "gives away before it is audited (docs/does-it-pay.md)"
    )
