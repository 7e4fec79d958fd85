"""The attacker's reference models: given, or trained on given texts from the base (``train:FILE``)."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from dualtok.audit.settings import TextSource
from dualtok.commands.audit.text_jobs import most_tokens, read_texts
from dualtok.commands.export import export
from dualtok.config.load import parse_run
from dualtok.data.text_lists import TextList, pack_texts
from dualtok.data.tokenizer import load_tokenizer
from dualtok.errors import ConfigError
from dualtok.files import write_text
from dualtok.launch.local import launch
from dualtok.model.folder.weights import model_folder
from dualtok.reference.fingerprint import weights_digest
from dualtok.train.checkpoints.manifest import COMPLETE
from dualtok.train.folder import CHECKPOINTS

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.run import RunConfig

TRAIN = "train:"
"""What stands before a file of texts that a reference is to be trained on."""
VALIDATION_SHARE = 20
"""One text of so many is kept for the evaluations of the training run."""
PREPARED = ("train", "validation")


def train_references(run: RunConfig, kept: Path, processes: int) -> dict[str, str]:
    """Return name -> folder or hub name of the attacker's references, after training those that are not there yet.

    The recipe is that of the sections ``model`` and ``train`` where the run has them, with the plain loss, else that of
    ``audit.reference_recipe``. The texts must share no document with what the defender used.

    Args:
        run: the audit's.
        kept: the audit's folder.
        processes: ranks that share each training run.

    Raises:
        ConfigError: there is no base to train from; or this process is one of several and a model is missing.
        DataError: a file of texts cannot be read.
        DualtokError: a training run failed.
    """
    references = run.audit.references
    return {
        name: str(_trained(run, name, path.removeprefix(TRAIN), kept / "references", processes))
        if path.startswith(TRAIN)
        else path
        for name, path in references.items()
    }


def _trained(run: RunConfig, name: str, source: str, root: Path, processes: int) -> Path:
    base = run.audit.base or (None if run.model is None else run.model.path)
    if base is None:
        raise ConfigError(
            f"audit.attack_reference: {TRAIN}{source} is trained from the base; give audit.base (--base), or model.path"
        )
    folder = model_folder(base)
    field = run.audit.members.field if isinstance(run.audit.members, TextSource) else run.data.field
    given = read_texts(TextSource(source, field=field), "audit.attack_reference")
    recipe = _recipe(run)
    content = f"{weights_digest(folder)}\n{recipe}\n" + "\n".join(given.texts)
    target = root / hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    if (target / "model").is_dir():
        return target / "model"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"audit.attack_reference: {TRAIN}{source} is not trained yet, which takes processes of its own; start "
            "`dualtok audit` without a launcher first (--processes shares the training)"
        )
    print(f"dualtok: attack reference: trained on {len(given.texts)} texts of {source}, in {target}", flush=True)
    data = pack_texts(
        target / "data",
        _with_validation(given),
        load_tokenizer(folder),
        most_tokens=most_tokens(run.audit, {name: folder}),
    )
    tree: dict[str, Any] = {
        "data": {"dir": str(data)},
        "output_dir": str(target / "run"),
        "seed": run.seed,
        "objective": "causal_lm",
        "model": {"path": str(folder), "trust_remote_code": run.audit.trust_remote_code},
        "train": {**recipe, "batch_size": min(recipe["batch_size"], data.entry(PREPARED[0]).blocks)},
    }
    own = parse_run(tree, source=f"attack reference {name}")
    file = target / "run.yaml"
    write_text(file, own.to_yaml())
    if not any((target / "run" / CHECKPOINTS).glob(f"step-*/{COMPLETE}")):
        launch(["train", str(file), "--auto-resume"], processes, target / "train.log")
    export(target / "run", target / "model", which="latest")
    return target / "model"


def _recipe(run: RunConfig) -> dict[str, Any]:
    """Return the section ``train`` of the reference's run."""
    if run.train is not None:
        train: dict[str, Any] = run.as_dict()["train"]
        return {**train, "split": "train", "leave_out": None}
    recipe = run.audit.reference_recipe
    return {
        "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size,
        "epochs": recipe.epochs,
        "warmup_steps": 0,
        "precision": "fp32",
    }


def _with_validation(given: TextList) -> dict[str, TextList]:
    everyone = range(len(given.texts))
    if len(everyone) < 2:
        raise ConfigError("audit.attack_reference: one text is too few to train a reference; give more")
    return {
        PREPARED[0]: given.some([i for i in everyone if i % VALIDATION_SHARE]),
        PREPARED[1]: given.some(everyone[::VALIDATION_SHARE]),
    }
