"""Settings of the canaries that ``dualtok prepare`` adds (:mod:`.canaries`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

SYMBOLS = {
    "digits": tuple("0123456789"),
    "words": (
        "alfa",
        "bravo",
        "charlie",
        "delta",
        "echo",
        "foxtrot",
        "golf",
        "hotel",
        "india",
        "juliett",
        "kilo",
        "lima",
        "mike",
        "november",
        "oscar",
        "papa",
        "quebec",
        "romeo",
        "sierra",
        "tango",
        "uniform",
        "victor",
        "whiskey",
        "xray",
        "yankee",
        "zulu",
    ),
}
"""What a secret of each kind is drawn from; the words are those of the ICAO spelling alphabet."""
MOST_BITS = 480
"""A secret is drawn from 512 bits."""


@dataclass(config=ConfigDict(extra="forbid"))
class CanaryConfig:
    """Made-up documents, each of which ``prepare`` puts into ``train`` or keeps out by a coin of its own."""

    count: Annotated[int, Field(ge=1)]
    """Canaries, included and left out together. A lower bound on epsilon grows with them; each included one is trained
    on. Unit: canaries."""

    kind: Literal["digits", "words"] = "digits"
    """What a secret is made of: digits, or words of the ICAO spelling alphabet (alfa to zulu)."""

    length: Annotated[int, Field(ge=1)] = 9
    """Digits or words of a secret, drawn independently and uniformly; Carlini et al. 2019 took nine digits. Unit:
    digits or words."""

    prefix: str = "The access code of {name} is"
    """What comes before the secret. ``{name}`` is a made-up word of each canary's own; without it all have the same
    prefix, and at most one secret can be extracted."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of texts and coins. Anyone who has it and these settings knows which canaries were included. Unit: none."""

    @property
    def space(self) -> int:
        """Number of secrets that each canary's was drawn from."""
        return int(len(SYMBOLS[self.kind]) ** self.length)

    def __post_init__(self) -> None:
        """Refuse an empty prefix, and spaces that are too small or too large."""
        if not self.prefix.strip() or self.prefix != self.prefix.strip():
            raise ValueError("data.canaries.prefix: must be some text without space around it")
        if self.space > 2**MOST_BITS:
            raise ValueError(f"data.canaries.length: {self.length} {self.kind} exceed {MOST_BITS} bits; lower it")
        if "{name}" not in self.prefix and self.space < 2 * self.count:
            raise ValueError(
                f"data.canaries.length: {self.length} {self.kind} make {self.space} secrets, too few for {self.count} "
                "different canaries; raise it, or put {name} into the prefix"
            )
