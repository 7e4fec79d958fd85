"""The privacy that DP-SGD spends: settings, noise and what the accountant says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dualtok.errors import ConfigError
from dualtok.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.privacy import PrivacyConfig

# Imported where they are used, for they need not be installed or wanted: opacus.

FILE = "privacy.json"


SLOW_EPSILON = 300
"""With less noise than this needs, Opacus' accountant ``prv`` took 14 s for one trial of many at 600, on one core."""


def slowness(privacy: PrivacyConfig) -> str | None:
    """Return what to say before the noise is looked for where that takes minutes, else None."""
    if privacy.accountant != "prv" or (privacy.epsilon or 0) < SLOW_EPSILON:
        return None
    return (
        "privacy.epsilon: the accountant 'prv' takes minutes, and gigabytes, to find the noise for "
        f"{privacy.epsilon:g}; privacy.accountant=rdp finds it at once, and asks for more noise"
    )


@dataclass(frozen=True)
class PrivacyAccount:
    """What a run promises: every step adds noise to a Poisson sample of clipped gradients, one per document."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    max_gradient_norm: float
    accountant: str
    documents: int
    truncated_documents: int
    """Documents of which only the first ``block_length`` tokens are learned."""
    secret_seed: bool

    @classmethod
    def plan(cls, privacy: PrivacyConfig, *, rate: float, steps: int, documents: int, truncated: int) -> PrivacyAccount:
        """Find the noise for the target, or take it as given.

        Raises:
            ConfigError: the target is out of the accountant's reach.
        """
        from opacus.accountants.utils import get_noise_multiplier

        noise = privacy.noise_multiplier
        if noise is None:
            try:
                noise = get_noise_multiplier(
                    target_epsilon=privacy.epsilon,
                    target_delta=privacy.delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant=privacy.accountant,
                )
            except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
                raise ConfigError(
                    f"privacy.epsilon: the accountant {privacy.accountant!r} finds no noise for {privacy.epsilon:g} in "
                    f"{steps} steps at a sample rate of {rate:.3g} ({' '.join(str(error).split())[:100]}); choose "
                    "another epsilon, fewer steps, or give privacy.noise_multiplier"
                ) from None
        return cls(
            noise,
            rate,
            steps,
            privacy.delta,
            privacy.max_gradient_norm,
            privacy.accountant,
            documents,
            truncated,
            privacy.secret_seed,
        )

    def epsilon(self, steps: int) -> float:
        """Return what so many steps have spent; infinite without noise."""
        from opacus.accountants import create_accountant

        if steps == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return float("inf")
        accountant = create_accountant(mechanism=self.accountant)
        accountant.history = [(self.noise_multiplier, self.sample_rate, steps)]
        return float(accountant.get_epsilon(self.delta))

    def write(self, folder: Path, steps: int) -> None:
        """Write ``privacy.json``: all of this, and epsilon after ``steps``."""
        facts = {**asdict(self), "steps_done": steps, "epsilon": self.epsilon(steps)}
        write_text(folder / FILE, json.dumps(facts, indent=1))


def stated(folder: Path) -> str | None:
    """Return what a run's ``privacy.json`` says in one line, or None if it was not trained with DP-SGD."""
    path = folder / FILE
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    known = "" if facts["secret_seed"] else ", against attackers who do not know the seed"
    return (
        f"({facts['epsilon']:.3g}, {facts['delta']:g})-DP per document after {facts['steps_done']} steps{known}: noise "
        f"multiplier {facts['noise_multiplier']:.3g}, clipping norm {facts['max_gradient_norm']:g}, sample rate "
        f"{facts['sample_rate']:.3g}, accountant {facts['accountant']}"
    )
