"""Settings of DP-SGD."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings


@settings(config=ConfigDict(extra="forbid"))
class PrivacyConfig:
    """How private a run with ``train.engine: opacus`` is to be; the unit is the document."""

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Target epsilon of the whole run; the noise that it takes is computed. Give this or ``noise_multiplier``. Unit:
    none."""

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability with which the guarantee may fail; well below one over the number of documents. Unit: probability."""

    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise over ``max_gradient_norm``. Unit: none."""

    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm that each document's gradient is clipped to. Unit: none."""

    accountant: Literal["prv", "rdp"] = "prv"
    """Opacus' accountant: ``prv`` (tight; from an epsilon of some hundred on it takes minutes and gigabytes) or
    ``rdp``."""

    secret_seed: bool = False
    """Draw documents and noise from a seed that is never written down. Without it they follow from ``seed``, so that a
    run can be repeated and resumed exactly: a guarantee only against those who do not know the seed."""

    def __post_init__(self) -> None:
        """Require one of the two ways to say how much noise."""
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("privacy: give exactly one of 'epsilon' and 'noise_multiplier'")
