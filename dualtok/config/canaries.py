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
LENGTH = 9
PREFIX = "The access code of {name} is"
TEMPERATURE = 1.0
TOKENS = 64
OF_SAMPLING = ("model", "temperature", "tokens", "prompt")
"""Settings of the kind ``high_temperature`` alone."""


@dataclass(config=ConfigDict(extra="forbid"))
class CanaryConfig:
    """Made-up documents, each of which ``prepare`` puts into ``train`` or keeps out by a coin of its own."""

    count: Annotated[int, Field(ge=1)]
    """Canaries, included and left out together. A lower bound on epsilon grows with them; each included one is trained
    on. Unit: canaries."""

    kind: Literal["digits", "words", "high_temperature", "new_tokens"] = "digits"
    """What canaries are. ``digits`` and ``words`` (of the ICAO spelling alphabet, alfa to zulu): a prefix and a secret,
    which gives exposure and extraction too. ``high_temperature``: text that a language model samples (Mitchell et al.
    2026, arXiv 2606.10481). ``new_tokens``: a prefix and one token that is rare in the source, another one for each
    (after Panda et al. 2025, arXiv 2503.06808)."""

    length: Annotated[int, Field(ge=1)] = LENGTH
    """Digits or words of a secret, drawn independently and uniformly; Carlini et al. 2019 took nine digits. Unit:
    digits or words."""

    prefix: str = PREFIX
    """What comes before the secret or the token. ``{name}`` is a made-up word of each canary's own; without it all have
    the same prefix, and at most one secret can be extracted."""

    model: str | None = None
    """Only ``high_temperature``, and required there: folder or hub name of the Hugging Face model that samples. It must
    not have been trained on the source."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Only ``high_temperature``: what the model's logits are divided by; 1 if not given. Mitchell et al. 2026 took .8
    and more. Unit: none."""

    tokens: Annotated[int, Field(ge=2)] | None = None
    """Only ``high_temperature``: tokens of the model that are sampled for each canary; 64 if not given. Unit:
    tokens."""

    prompt: str | None = None
    """Only ``high_temperature``: text that the model continues, e.g. a beginning like the source's; it is no part of
    the canaries."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of texts and coins. Anyone who has it and these settings knows which canaries were included. Unit: none."""

    @property
    def space(self) -> int:
        """Number of secrets that each canary's was drawn from; 1 where there are no others."""
        return int(len(SYMBOLS[self.kind]) ** self.length) if self.kind in SYMBOLS else 1

    def __post_init__(self) -> None:
        """Refuse settings without effect, an empty prefix, and spaces that are too small or too large."""
        if not self.prefix.strip() or self.prefix != self.prefix.strip():
            raise ValueError("data.canaries.prefix: must be some text without space around it")
        self._refuse_settings_without_effect()
        if self.kind == "high_temperature":
            if self.model is None:
                raise ValueError("data.canaries.model: missing; high_temperature needs a model that samples")
            self.temperature = TEMPERATURE if self.temperature is None else self.temperature
            self.tokens = TOKENS if self.tokens is None else self.tokens
        if self.kind not in SYMBOLS:
            return
        if self.space > 2**MOST_BITS:
            raise ValueError(f"data.canaries.length: {self.length} {self.kind} exceed {MOST_BITS} bits; lower it")
        if "{name}" not in self.prefix and self.space < 2 * self.count:
            raise ValueError(
                f"data.canaries.length: {self.length} {self.kind} make {self.space} secrets, too few for {self.count} "
                "different canaries; raise it, or put {name} into the prefix"
            )

    def _refuse_settings_without_effect(self) -> None:
        idle = [] if self.kind == "high_temperature" else [n for n in OF_SAMPLING if getattr(self, n) is not None]
        if self.kind not in SYMBOLS and self.length != LENGTH:
            idle.append("length")
        if self.kind == "high_temperature" and self.prefix != PREFIX:
            idle.append("prefix")
        if idle:
            raise ValueError(f"data.canaries.{idle[0]}: has no effect with kind {self.kind}; remove it")
