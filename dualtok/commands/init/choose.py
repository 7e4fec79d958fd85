"""From what is asked for, and what the documents are like, to settings; the layout on GPUs is `dualtok plan`'s."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtok.commands.plan.run import make_cluster, plan
from dualtok.commands.plan.write import deepspeed_json
from dualtok.commands.run.planned import with_its_reference
from dualtok.config.load import parse_run
from dualtok.errors import ConfigError
from dualtok.plan.shapes import named

if TYPE_CHECKING:
    from dualtok.commands.init.look import Look
    from dualtok.commands.init.recipes import Recipe
    from dualtok.config.run import RunConfig
    from dualtok.plan.layouts import Option

SHARES = {"train": 0.6, "reference": 0.12, "attack_reference": 0.12, "validation": 0.06, "held_out": 0.1}
FEWEST_DOCUMENTS = 100
"""Below this a split of a tenth holds fewer than ten documents."""
STEPS_PER_EPOCH = 24
"""At least about so many, if the documents are enough."""
MOST_BLOCKS = 64
FEWEST_BLOCKS = 200
"""Of the split ``train`` per rank, below which blocks are cut shorter."""
TOKENS_PER_PARAMETER = 20
"""Of a model that is trained from scratch (Hoffmann et al. 2022, arXiv 2203.15556)."""
SIZES = ((64, 2), (128, 2), (192, 4), (256, 6), (512, 8), (768, 12), (1024, 24), (2048, 24))
"""Width and layers of models to be pretrained, from 0.1 to 1,200 million parameters."""
MANY_TOKENS = 10_000_000
"""From which on a new model reads them once."""
LARGE, MIDDLE = 1e9, 5e7
RATES = {"finetune": (1e-5, 5e-5, 1e-3), "lora": (1e-4, 2e-4, 2e-3), "pretrain": (3e-4, 1e-3, 3e-3)}
"""Recipe -> learning rate of a large, a middle and a small model."""
JSON_FILE = "deepspeed.json"


@dataclass(frozen=True)
class Machine:
    """Where a run is to happen."""

    gpus: int
    """Accelerators of the host; 0 is host cores."""
    device: str = "h100"
    """What they are, as `dualtok plan` knows them."""
    host_memory: str = "1TB"
    folder: Path = Path()
    """Of the run file, where the DeepSpeed JSON goes, too."""


@dataclass(frozen=True)
class Choice:
    """The settings of a run file, and the files that it names."""

    tree: dict[str, Any]
    recipe: Recipe
    files: dict[str, str]
    """Path -> text."""
    layout: str
    """The layout in words, and why."""


def choose(recipe: Recipe, model: str | None, data: dict[str, Any], look: Look, *, machine: Machine) -> Choice:
    """Choose the settings of a run.

    Args:
        recipe: any but ``audit``.
        model: folder or name of the model; None for ``pretrain``.
        data: ``dir`` and ``source``.
        look: what the documents are like.
        machine: where it is to run.

    Raises:
        ConfigError: there are too few documents, or the model does not fit.
    """
    if look.documents < FEWEST_DOCUMENTS:
        raise ConfigError(
            f"{data['source']}: {look.documents} different documents; five splits need {FEWEST_DOCUMENTS} and "
            "more, better some thousand; one document per line or file (`dualtok settings data.txt_documents`)"
        )
    gpus = machine.gpus
    length = block_length(look, context_of(model), gpus)
    batch = batch_size(look, length, max(1, gpus))
    tree: dict[str, Any] = {
        "output_dir": "runs/dual",
        "objective": "dual",
        "workflow": _workflow(gpus),
        "data": {**data, "block_length": length, "lanes": lanes(look, length)},
        "model": {"path": model} if model is not None else {"config": fresh_config(look, length)},
        "train": {
            "precision": "bf16" if gpus else "fp32",
            "learning_rate": RATES["pretrain"][2],
            "batch_size": batch,
            "epochs": 1 if recipe == "pretrain" and look.tokens >= MANY_TOKENS else 3,
        },
        "audit": {"fpr_targets": targets(look)},
    }
    if model is None:
        tree["data"]["vocab_size"] = look.vocabulary
    else:
        tree["data"]["tokenizer"] = model
    tree["data"]["shares"] = SHARES
    if recipe == "lora":
        tree["model"]["lora"] = {"rank": 16, "alpha": 32}
    if gpus:
        tree["reference"] = {"precision": "bf16"}
        tree["audit"]["precision"] = "bf16"
    return _laid_out(tree, recipe, look, machine=machine)


def _laid_out(tree: dict[str, Any], recipe: Recipe, look: Look, *, machine: Machine) -> Choice:
    """Return the choice with the layout that `dualtok plan` finds best, and the learning rate of the model's size."""
    run = with_its_reference(parse_run(tree, source="dualtok init"))
    gpus, device = machine.gpus, machine.device
    cluster = make_cluster(
        device=device, nodes=1, gpus=max(1, gpus), gpu_memory=None, host_memory=machine.host_memory, network="400Gb/s"
    )
    tokens = max(1, int(look.tokens * SHARES["train"]))
    if not gpus:
        size = _parameters(run, cluster, tokens)
        tree["train"]["learning_rate"] = rate_of(recipe, size)
        return Choice(tree, recipe, {}, "one process on host cores")
    found = plan(run, cluster, tokens)
    option = next((option for option in found.options if option.fits and not _uses_files(option)), None)
    if option is None and recipe == "finetune":
        lora = {**tree, "model": {**tree["model"], "lora": {"rank": 16, "alpha": 32}}}
        choice = _laid_out(lora, "lora", look, machine=machine)
        return Choice(choice.tree, "lora", choice.files, f"{choice.layout}; all weights would not fit, so LoRA")
    if option is None:
        raise ConfigError(
            f"--model: {tree['model'].get('path', 'the model')} does not fit {gpus} x {device} in any layout; give "
            "more --gpus, or see `dualtok plan`"
        )
    tree["train"]["learning_rate"] = rate_of(recipe, found.shape.parameters)
    tree["train"] |= _layout(option)
    tree["model"] |= {"activation_checkpointing": True} if option.job.activation_checkpointing else {}
    path = str(machine.folder / JSON_FILE)
    tree["train"]["deepspeed"] = path
    files = {path: json.dumps(deepspeed_json(option.job), indent=2) + "\n"}
    return Choice(tree, recipe, files, f"{option.name} on {gpus} x {device}")


def _parameters(run: RunConfig, cluster: Any, tokens: int) -> int:
    return plan(run, cluster, tokens).shape.parameters


def _layout(option: Option) -> dict[str, Any]:
    job = option.job
    found: dict[str, Any] = {} if job.engine == "zero" else {"engine": job.engine, "pipeline": {"stages": job.stages}}
    if job.engine != "zero" and job.keep_gathered:
        found["pipeline"]["keep_gathered"] = True
    return found | ({"gradient_accumulation": job.micro_batches} if job.micro_batches > 1 else {})


def _uses_files(option: Option) -> bool:
    """Return whether a layout keeps states in files: such a run cannot be resumed."""
    return "nvme" in (option.job.offload_optimizer, option.job.offload_parameters)


def _workflow(gpus: int) -> dict[str, Any]:
    return {"plain": True, **({"launcher": "torchrun", "ranks": gpus} if gpus > 1 else {"launcher": "none"})}


def blocks_of(look: Look, share: float, length: int) -> int:
    """Return about how many blocks a split of some share has."""
    return int(look.tokens * share / length)


def rate_of(recipe: Recipe, parameters: int) -> float:
    """Return a learning rate to begin with."""
    large, middle, small = RATES[recipe]
    return large if parameters >= LARGE else middle if parameters >= MIDDLE else small


def block_length(look: Look, context: int | None, gpus: int) -> int:
    """Return the tokens per block: a power of 2 that most documents fit into, within the model's context."""
    most = min(context or 1024, 2048 if gpus else 512)
    length = 64
    enough = FEWEST_BLOCKS * max(1, gpus)
    while length < min(look.longest, most) and blocks_of(look, SHARES["train"], 2 * length) >= enough:
        length *= 2
    return min(length, most)


def batch_size(look: Look, length: int, ranks: int) -> int:
    """Return blocks per step: few enough for some steps, and for the smallest split that is trained on."""
    smallest = blocks_of(look, min(SHARES["reference"], SHARES["attack_reference"]), length)
    wanted = min(MOST_BLOCKS, blocks_of(look, SHARES["train"], length) // STEPS_PER_EPOCH, smallest // 2)
    size = ranks
    while size * 2 <= wanted:
        size *= 2
    if size > smallest:
        raise ConfigError(
            f"the split 'reference' would have about {smallest} blocks of {length} tokens, fewer than one step of "
            f"{size} takes; give more documents, or fewer --gpus"
        )
    return size


def lanes(look: Look, length: int) -> int:
    """Return a number of lanes that every split can fill."""
    smallest = blocks_of(look, min(SHARES.values()), length)
    return next((lanes for lanes in (64, 32, 16, 8, 4) if smallest >= 2 * lanes), 2)


def targets(look: Look) -> list[float]:
    """Return false-positive rates that the non-members are enough for: ten of them and more each."""
    held_out = look.documents * SHARES["held_out"]
    return [rate for rate in (0.1, 0.01, 0.001) if rate == 0.1 or held_out * rate >= 10]


def fresh_config(look: Look, length: int) -> dict[str, Any]:
    """Return the configuration of a model of about one parameter per 20 tokens."""
    wanted = look.tokens * SHARES["train"] / TOKENS_PER_PARAMETER
    hidden, layers = next((size for size in reversed(SIZES) if 12 * size[0] ** 2 * size[1] <= wanted), SIZES[0])
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
    }


def context_of(model: str | None) -> int | None:
    """Return the positions of a model whose configuration is known without loading it."""
    if model is None:
        return None
    path = Path(model) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else named(model) or {}
    found = [config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(config.get(key), int)]
    return found[0] if found else None
