"""Options of ``dualtok audit``, read before anything that takes seconds is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualtok.commands.processes import is_first_rank
from dualtok.commands.quiet import quiet_libraries
from dualtok.errors import ConfigError

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig

# Imported where they are used, for what they take to load: dualtok's commands (torch 1 s, transformers 1 to 4 s), and
# the settings (pydantic, numpy: .3 s).


def audit(
    run_file: Annotated[Path | None, typer.Argument(help="The run's YAML file; or give --model.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's, e.g. audit.batch_size=16.")
    ] = None,
    shadows: Annotated[
        int | None, typer.Option(metavar="N", help="Train N shadow models by the run's recipe, for LiRA.")
    ] = None,
    extract: Annotated[
        int | None,
        typer.Option(metavar="N", help="Let each model continue the beginnings of N members and N non-members."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks that share each shadow's training.")] = 1,
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]MODEL", help="Model to audit: folder, hub name or peft adapter; repeatable."),
    ] = None,
    members: Annotated[str | None, typer.Option(metavar="A", help="Texts it was trained on: file, folder.")] = None,
    non_members: Annotated[str | None, typer.Option(metavar="B", help="Texts like them that it never saw.")] = None,
    field: Annotated[str | None, typer.Option(help="Key or column that holds the text; default: text.")] = None,
    attack_reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]R", help="The attacker's reference: a model, or train:FILE to train one; repeatable."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model before fine-tuning; the attacker's reference if there is no other.")
    ] = None,
    group_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field that says whose a text is: audit whole groups, too.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="D", help="Peft adapter to add to the model.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything is written; runs/audit.")] = None,
) -> None:
    """Attack models with membership inference and measure their perplexity: those of a run, or any with --model."""
    given: dict[str, Any] = {
        "members": members,
        "non_members": non_members,
        "field": field,
        "attack_reference": attack_reference,
        "base": base,
        "adapter": adapter,
        "out": out,
    }
    short = {"shadows": shadows, "extract": extract, "group_field": group_field}
    changes = [*(overrides or []), *(f"audit.{key}={value}" for key, value in short.items() if value is not None)]
    run = _run_of(run_file, changes, model or [], given)
    if processes > 1 and run.audit.shadows is None:
        raise ConfigError("--processes: has no effect without --shadows; to share the audit itself, use a launcher")
    quiet_libraries()
    from dualtok.commands.audit.run import audit as run_audit
    from dualtok.commands.audit.run import print_figures

    figures = run_audit(run, processes=processes)
    if is_first_rank():
        print_figures(figures)
        if model:
            _report(run)


def _report(run: RunConfig) -> None:
    """Write the report of an audit without a run file, and the file that it can be run again with."""
    from dualtok.commands.audit.flags import keep_run
    from dualtok.commands.report import write_run_report

    print(f"wrote {write_run_report(run)}", flush=True)
    print(f"the same again, or with other settings: dualtok audit {keep_run(run)}", flush=True)


def _run_of(run_file: Path | None, changes: list[str], models: list[str], given: dict[str, Any]) -> RunConfig:
    """Return the audit that a file, or ``--model`` with its flags, describe."""
    if models:
        from dualtok.commands.audit.flags import run_of_flags

        return run_of_flags(models, [*([] if run_file is None else [str(run_file)]), *changes], **given)
    if run_file is None:
        raise ConfigError("audit: give a run's YAML file, or --model, --members and --non-members")
    extra = next((name for name, value in given.items() if value is not None), None)
    if extra is not None:
        raise ConfigError(f"--{extra.replace('_', '-')}: only together with --model; a run's file has its own")
    from dualtok.config.load import load_run

    return load_run(run_file, changes)
