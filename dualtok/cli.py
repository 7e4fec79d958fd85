"""The command line: one verb per arrow of the way of the data.

A :class:`~dualtok.errors.DualtokError` is printed as one line and ends the process with status 2; anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualtok import __version__
from dualtok.commands.audit.command import audit
from dualtok.commands.gate.command import gate
from dualtok.commands.init.command import init
from dualtok.commands.processes import is_first_rank
from dualtok.commands.processes import refuse_launcher as _refuse_launcher
from dualtok.commands.quiet import quiet_libraries
from dualtok.commands.run.command import run
from dualtok.commands.settings.command import complete_setting, schema, settings
from dualtok.commands.settings.sections import sections_of
from dualtok.errors import PREEMPTED, ConfigError, DualtokError, Preempted, print_to_stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualtok.config.canaries import CanaryConfig
    from dualtok.config.run import RunConfig

# Imported where they are used, for what they take to load: dualtok's commands (torch 1 s, transformers 1 to 4 s).

app = typer.Typer(
    help="Train language models so that it is hard to tell which documents they saw, and measure how hard.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RunFile = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace the file's, e.g. train.steps=100.",
        show_default=False,
        autocompletion=complete_setting,
    ),
]
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


def _print_version(wanted: bool) -> None:
    if wanted:
        _print(f"dualtok {__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", help="Show the version and end.", callback=_print_version, is_eager=True)
]


@app.callback()
def common(local_rank: LocalRank = None, show_version: ShowVersion = False) -> None:
    """Take the argument that DeepSpeed's launcher puts in front; the rank itself comes from the environment."""


@app.command(epilog=sections_of("prepare"))
def prepare(
    run_file: RunFile,
    overrides: Overrides = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Read and hash part I of N only, beside others on any host.")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Make shards of what all parts have read.")] = False,
    canaries: Annotated[
        int | None, typer.Option(metavar="N", help="Add N canaries for the audit; short for data.canaries.count=N.")
    ] = None,
) -> None:
    """Deduplicate, split, tokenize and pack documents into shards."""
    _refuse_launcher("prepare")
    if part is not None and finish:
        raise ConfigError("--part and --finish: one after the other; `--finish` follows when all parts are complete")
    short_forms = [] if canaries is None else [f"data.canaries.count={canaries}"]
    data = _load(run_file, [*(overrides or []), *short_forms]).data
    from dualtok.data.prepare import pipeline
    from dualtok.data.prepare.parts import parse_part

    sampler: Callable[[CanaryConfig], list[str]] | None = None
    if data.canaries is not None and data.canaries.kind == "high_temperature":
        quiet_libraries()
        # Imported for these canaries alone, as it takes seconds to load: torch.
        from dualtok.commands.prepare import sample_texts

        sampler = sample_texts

    if part is not None:
        pipeline.prepare_part(data, parse_part(part))
    elif finish:
        pipeline.finish(data, sampler=sampler)
    else:
        pipeline.prepare(data, sampler=sampler)


@app.command(epilog=sections_of("score"))
def score(run_file: RunFile, overrides: Overrides = None) -> None:
    """Compute the reference model's loss on every token, once; stored beside the shards."""
    run = _load(run_file, overrides)
    quiet_libraries()
    from dualtok.commands.score.run import score as run_score

    summary = run_score(run)
    _print(
        f"{summary.shards} shards scored ({summary.scored} now, {summary.tokens_per_second:,.0f} tokens/s) "
        f"in {summary.folder}"
    )


@app.command(epilog=sections_of("train"))
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest complete checkpoint.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue if there is a complete checkpoint, else start.")
    ] = False,
) -> None:
    """Train a model on DeepSpeed with a run's objective (dual, dual_plus, selective, goldfish, causal_lm) or DP-SGD."""
    if resume and auto_resume:
        raise ConfigError("--resume and --auto-resume: give one of them")
    run = _load(run_file, overrides)
    quiet_libraries()
    from dualtok.commands.train import train as run_train

    state = run_train(run, resume="always" if resume else "if_any" if auto_resume else "never")
    _print(
        f"{state.step} steps done; best validation loss {state.best_loss:.4f} at step {state.best_step}; "
        f"checkpoints in {Path(run.output_dir) / 'checkpoints'}"
    )
    if run.objective == "dual_plus":
        again = shlex.join(["dualtok", "interpolate", str(run_file), "TARGET", *(overrides or [])])
        _print(f"interpolate this model before you release it; until then attacks can tell its members: {again}")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A training run's output_dir.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Hugging Face folder to make.", show_default=False)],
    checkpoint: Annotated[str, typer.Option(help="best, latest, or a checkpoint's name.")] = "best",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    merge: Annotated[bool, typer.Option("--merge", help="For a run with adapters: write the whole model.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder (safetensors, config, tokenizer), or as a peft adapter folder."""
    _refuse_launcher("export")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision {precision!r}: must be fp32 or bf16")
    quiet_libraries()
    from dualtok.commands.export import export as run_export

    _print(f"wrote {run_export(run_dir, target, which=checkpoint, precision=precision, merge=merge)}")


@app.command(epilog=sections_of("interpolate"))
def interpolate(
    run_file: RunFile,
    target: Annotated[Path, typer.Argument(help="Hugging Face folder to make.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Interpolate a trained model towards its reference, or choose a checkpoint, within the limit interpolate.auc."""
    run = _load(run_file, overrides)
    quiet_libraries()
    from dualtok.commands.interpolate import interpolate as run_interpolate

    kept = run_interpolate(run, target)
    what = f"the checkpoint of step {kept.step}"
    if kept.step is None:
        what = f"{kept.w:.3f} of the way from the reference to the model"
    _print(f"wrote {target}: {what}")
    if kept.w:
        _print(
            "keep the reference secret: an attacker who has it reaches an AUC of "
            f"{kept.auc_with_reference:.3f} with the attack Ref"
        )


@app.command("retreat", hidden=True)
def retreat(run_file: RunFile, target: Path, overrides: Overrides = None) -> None:
    """Do what ``interpolate`` does, under its name before 0.2."""
    if is_first_rank():
        print_to_stderr("dualtok: `dualtok retreat` is now called `dualtok interpolate`; the old name works until 0.3")
    interpolate(run_file, target, overrides)


app.command(epilog=sections_of("audit"))(audit)


@app.command(epilog=sections_of("report"))
def report(run_file: RunFile, overrides: Overrides = None) -> None:
    """Write the audit's figures as one HTML page, JSON and CSV."""
    _refuse_launcher("report")
    run = _load(run_file, overrides)
    from dualtok.commands.report import write_run_report

    _print(f"wrote {write_run_report(run)}")


app.command()(gate)


@app.command(epilog=sections_of("plan"))
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators per host.")] = 8,
    device: Annotated[str, typer.Option(help="a100, a100-40gb, h100 or h200.")] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of each accelerator, e.g. 80GB; default: the device's own.")
    ] = None,
    host_memory: Annotated[str, typer.Option(help="Memory of each host.")] = "1TB",
    network: Annotated[
        str, typer.Option(help="Bandwidth from a host to others, over all adapters, one direction.")
    ] = "400Gb/s",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the split to train on, if it is not prepared yet.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Private documents, if the data is not prepared yet: what they may leak.")
    ] = None,
    auxiliary: Annotated[
        int | None, typer.Option(min=0, help="With --documents: auxiliary documents that the reference learns.")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the best layout as files there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Say whether a run fits on some machines, how long it takes, and which layout is fastest; reads no weights."""
    _refuse_launcher("plan")
    run = _load(run_file, overrides)
    from dualtok.commands.plan.run import make_cluster, show_plan
    from dualtok.commands.run.planned import with_its_reference

    cluster = make_cluster(
        device=device, nodes=nodes, gpus=gpus, gpu_memory=gpu_memory, host_memory=host_memory, network=network
    )
    run = with_its_reference(run)
    show_plan(run, cluster, tokens, write, as_json=as_json, documents=documents, auxiliary=auxiliary)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    processes: Annotated[int, typer.Option(min=1, help="Ranks that share each training run.")] = 2,
) -> None:
    """Do the whole job on public text: prepare, pretrain, reference, score, plain and dual training, audit, report."""
    _refuse_launcher("demo")
    from dualtok.commands.demo import run_demo

    run_demo(folder, processes)


@app.command(epilog=sections_of("launch"))
def launch(
    run_file: RunFile,
    overrides: Overrides = None,
    *,
    backend: Annotated[str, typer.Option(help="deepspeed, torchrun, slurm, mpi or k8s.")] = "torchrun",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Hosts; without it all of the hostfile, or one.", show_default=False)
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks per host; without it the hostfile's slots, or this host's.")
    ] = None,
    verb: Annotated[str, typer.Option(help="What the ranks do: train, score or audit.")] = "train",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print scripts and command; start nothing.")] = False,
) -> None:
    """Start the ranks of a run on the hosts of a cluster; the section `launch` says how."""
    _refuse_launcher("launch")
    run = _load(run_file, overrides)
    from dualtok.launch.start import SCRIPTS, build_start, start

    job = build_start(run, run_file, overrides or [], verb=verb, backend=backend, nodes=nodes, gpus=gpus)
    start(job, Path(run.output_dir).absolute() / SCRIPTS, dry_run=dry_run)


@app.command()
def doctor(
    run_file: Annotated[Path | None, typer.Argument(help="A run's YAML file, to check what it needs.")] = None,
    hosts: Annotated[Path | None, typer.Option(help="Hostfile (NAME slots=N per line): check each over ssh.")] = None,
    ssh: Annotated[str, typer.Option(help="Command that enters a host, with its options; with --hosts.")] = "ssh",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes longer: ranks, compiling.")] = False,
) -> None:
    """Look for what would stop, hang or spoil a run on this machine or on several; exit status 1 if a check fails."""
    _refuse_launcher("doctor")
    from dualtok.commands.doctor import run_doctor

    quiet_libraries()
    if run_doctor(run_file, hosts, ssh=ssh, json=json, quick=quick):
        raise typer.Exit(1)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="A training run's output_dir, or its YAML file.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Report a run's progress, whether it is alive, why it ended, and the next step."""
    from dualtok.commands.status import print_status

    print_status(run_dir, json=json)


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(help="A prepared folder, or its address.", show_default=False)],
    split: Annotated[str, typer.Option(help="One of its splits.")] = "train",
    samples: Annotated[int, typer.Option(min=0, help="Documents to show, the first ones of the split.")] = 3,
    blocks: Annotated[int, typer.Option(min=0, help="Blocks to list with their documents.")] = 3,
    color: Annotated[
        bool | None, typer.Option("--color/--no-color", help="Show trained tokens in color, or between ⟦ and ⟧.")
    ] = None,
) -> None:
    """Show documents of a prepared folder with the tokens that are trained, and blocks with their documents."""
    _refuse_launcher("inspect")
    quiet_libraries()
    from dualtok.commands.inspect import inspect_data

    inspect_data(data, split, samples=samples, blocks=blocks, color=color)


app.command()(init)
app.command(epilog=sections_of("run"))(run)
app.command()(settings)
app.command()(schema)


def _load(run_file: Path, overrides: list[str] | None) -> RunConfig:
    """Read the run's settings: before libraries are imported, so that a mistake is told at once."""
    from dualtok.config.load import load_run

    return load_run(run_file, overrides or [])


def _print(text: str) -> None:
    """Print a result on the first rank only."""
    if is_first_rank():
        print(text, flush=True)


def _leave_ranks(status: int = 0) -> None:
    """End a rank of a job together with the others, without the interpreter's own shutdown.

    A worker thread of gloo may still free a tensor, for which it takes the interpreter's lock; when the interpreter is
    already shutting down that aborts the process (``terminate called without an active exception``; seen in 2 of 36
    starts, torch 2.13.0).
    """
    if "torch.distributed" in sys.modules:
        from dualtok.distributed.ranks import leave_ranks

        if leave_ranks():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _in_words(problem: DualtokError | OSError) -> str:
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem)


def main() -> None:
    """Entry point of the console script ``dualtok``."""
    try:
        app()
    except SystemExit as end:  # typer's way to end, in success too
        if not end.code:
            _leave_ranks()
        raise
    except Preempted as end:
        _print(f"dualtok: {end}")
        _leave_ranks(PREEMPTED)
        sys.exit(PREEMPTED)
    except (DualtokError, OSError) as problem:
        error = _in_words(problem)
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # An error that every rank sees is printed by the first alone: the launcher stops the others meanwhile.
            time.sleep(3)
        where = f"rank {rank}: " if rank != "0" else ""
        print_to_stderr(f"dualtok: error: {where}{' '.join(error.split())}")
        # Not sys.exit: a rank inside a collective, or a data worker, must not be able to hold the process up.
        os._exit(2)
