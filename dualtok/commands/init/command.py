"""The command line of ``dualtok init``: asks for what was not given, where there is somebody to ask."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualtok.commands.processes import refuse_launcher
from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dualtok.commands.init.choose import Choice, Machine
    from dualtok.commands.init.recipes import Recipe

# Imported where they are used, for what they take to load: dualtok.commands.init (settings, pyarrow, .6 s).

QUESTIONS = {
    "data": "Documents (a file or folder)",
    "model": "Model to fine-tune (folder or hub name; empty: train a new one)",
    "members": "Texts that the model was trained on",
    "non_members": "Texts of the same kind that it has never seen",
}


def init(
    *,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the model to fine-tune, or to audit.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File or folder of documents; for an audit, of members.", show_default=False)
    ] = None,
    non_members: Annotated[
        str | None, typer.Option(metavar="B", help="Only for an audit: texts the model has never seen.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Accelerators of this host; without it all there are.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="What they are: a100, a100-40gb, h100 or h200.")] = "h100",
    recipe: Annotated[
        str | None,
        typer.Option(help="finetune, lora, pretrain or audit; without it as the model suggests.", show_default=False),
    ] = None,
    field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    out: Annotated[Path, typer.Option(help="File to write; nothing is overwritten.")] = Path("run.yaml"),
) -> None:
    """Write a commented run file for some documents, a model and this machine; the layout is planned."""
    refuse_launcher("init")
    if out.exists():
        raise ConfigError(f"{out}: exists already, and is not overwritten; give another name with --out, or remove it")
    _require_known(recipe)
    is_audit = recipe == "audit"
    if data is None:
        data = _ask("data" if not is_audit else "members", "--data")
    if model is None and recipe != "pretrain":
        model = _ask("model", None if recipe is None else "--model") or None
    chosen = _recipe(recipe, model)
    if chosen == "audit":
        _write_audit(out, str(model), data, non_members or _ask("non_members", "--non-members"), field)
        return
    if non_members is not None:
        raise ConfigError("--non-members: only with --recipe audit; other recipes hold documents out themselves")
    from dualtok.commands.init.choose import Machine

    own = accelerators()
    machine = Machine(own if gpus is None else gpus, device, host_memory() if own else "1TB", out.parent)
    _write_training(out, chosen, model, _data(data, field), machine)


def _ask(name: str, option: str | None) -> str:
    """Ask at the terminal; without one, the option must have been given, and None stands for an empty answer."""
    if sys.stdin.isatty():
        return str(typer.prompt(QUESTIONS[name], default="" if option is None else None, show_default=False)).strip()
    if option is None:
        return ""
    raise ConfigError(f"{option}: missing, and there is no terminal to ask at; give it on the command line")


def _require_known(recipe: str | None) -> None:
    from dualtok.commands.init.recipes import RECIPES

    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"--recipe {recipe!r}{did_you_mean(recipe, RECIPES)}: must be one of {', '.join(RECIPES)}")


def _recipe(recipe: str | None, model: str | None) -> Recipe:
    """Return the recipe, and refuse a model that it has no use for, or none where it needs one."""
    from dualtok.commands.init.recipes import RECIPES

    name = recipe or ("finetune" if model else "pretrain")
    found = next(known for known in RECIPES if known == name)
    if found == "pretrain" and model is not None:
        raise ConfigError("--model: has no effect with --recipe pretrain, which trains a new model; leave one out")
    if found != "pretrain" and not model:
        raise ConfigError(f"--model: missing; --recipe {found} needs the folder or hub name of a model")
    return found


def _data(source: str, field: str) -> dict[str, Any]:
    if not Path(source).exists():
        raise ConfigError(f"--data: {source} is neither a file nor a folder")
    return {"dir": "data", "source": source, **({"field": field} if field != "text" else {})}


def _write_training(out: Path, recipe: Recipe, model: str | None, data: dict[str, Any], machine: Machine) -> None:
    """Look at the documents, choose, and write."""
    from dualtok.commands.init.choose import choose
    from dualtok.commands.init.look import look_at
    from dualtok.commands.init.write import run_text, write_files
    from dualtok.commands.quiet import quiet_libraries
    from dualtok.config.data import DataConfig

    print(f"looking at {data['source']}", flush=True)
    quiet_libraries()
    look = look_at(DataConfig(**data, tokenizer=model))
    print(f"  {look.text}", flush=True)
    choice = choose(recipe, model, data, look, machine=machine)
    about = f"Written by `dualtok init` ({choice.recipe}): {choice.layout}.\n{look.text[0].upper()}{look.text[1:]}."
    _tell(write_files(out, run_text(choice.tree, about), choice.files), out, choice)


def _write_audit(out: Path, model: str, members: str, non_members: str, field: str) -> None:
    from dualtok.commands.init.write import run_text, write_files

    for option, path in (("--data", members), ("--non-members", non_members)):
        if not Path(path).exists():
            raise ConfigError(f"{option}: {path} is neither a file nor a folder")
    if Path(members).resolve() == Path(non_members).resolve():
        raise ConfigError("--non-members: the same texts as --data; give texts that the model has never seen")
    named = {"field": field} if field != "text" else {}
    sides = {"members": {"source": members, **named}, "non_members": {"source": non_members, **named}}
    tree = {"output_dir": "runs/audit", "audit": {"models": {"model": model}, **sides}}
    about = "Written by `dualtok init` (audit): attacks a model on texts that it was and was not trained on."
    _tell(write_files(out, run_text(tree, about), {}), out, None)


def _tell(files: list[Path], out: Path, choice: Choice | None) -> None:
    if choice is not None:
        print(f"  {choice.recipe}: {choice.layout}")
    print(f"wrote {', '.join(map(str, files))}\nnext: dualtok run {out}", flush=True)


def accelerators() -> int:
    """Return the accelerators of this host, counted by their drivers' files: torch takes a second to load."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def host_memory() -> str:
    """Return the memory of this host, as `dualtok plan` takes it."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2**30}GB"
