"""``dualtok train``: from a run's settings to a training loop; all is checked before the first weight is read."""

from __future__ import annotations

import secrets
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from torch import nn

from dualtok.commands.plan.leak import warning_of
from dualtok.config.old_names import with_new_names
from dualtok.data.mixed import load_sources
from dualtok.data.stream.blocks import BlockStream
from dualtok.data.stream.mixture import Mixture
from dualtok.data.stream.poisson import PoissonDocuments
from dualtok.data.tokenizer import vocabulary_size
from dualtok.distributed.deepspeed_config import training_config, zero_stage
from dualtok.distributed.heartbeat import STATUS_FILE, watch_hosts
from dualtok.distributed.job_record import JobRecord, write_end
from dualtok.distributed.layout import build_layout
from dualtok.distributed.preemption import PreemptionNotice
from dualtok.distributed.ranks import join_ranks
from dualtok.distributed.watchdog import Watchdog
from dualtok.errors import CheckpointError, ConfigError, print_to_stderr
from dualtok.model.adapters import prepare_adapters
from dualtok.model.load import starting_config
from dualtok.objective.loss import build_objective
from dualtok.reference.fingerprint import blocks_digest, reference_fingerprint
from dualtok.reference.live import AdapterReference
from dualtok.reference.stored import StoredLosses
from dualtok.train.checkpoints.manifest import COMPLETE
from dualtok.train.checkpoints.writer import find_checkpoint
from dualtok.train.checks import changes, count_steps, require_reference
from dualtok.train.engines.build import build_engine
from dualtok.train.engines.dp_account import PrivacyAccount, slowness
from dualtok.train.folder import CHECKPOINTS, RUN_FILE, START_FOLDER
from dualtok.train.live_reference import build_reference, check_reference
from dualtok.train.loop import LoopState, TrainingLoop
from dualtok.train.monitors import require_monitors
from dualtok.train.start_folder import write_start_folder
from dualtok.train.watch import efficiency

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualtok.config.model import ModelConfig
    from dualtok.config.privacy import PrivacyConfig
    from dualtok.config.reference import ReferenceConfig
    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig
    from dualtok.data.folder import DataFolder
    from dualtok.data.mixed import Source
    from dualtok.data.stream.mixture import TrainingStream
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.distributed.layout import Layout
    from dualtok.distributed.ranks import Ranks
    from dualtok.model.adapters import Adapters
    from dualtok.reference.fingerprint import Fingerprint
    from dualtok.reference.live import LiveReference
    from dualtok.train.checkpoints.writer import SavedCheckpoint
    from dualtok.train.engines.base import TrainingEngine


Resume = Literal["never", "always", "if_any"]


def train(run: RunConfig, *, resume: Resume = "never") -> LoopState:
    """Train the run's model to its last step.

    Args:
        run: settings with the sections ``model`` and ``train``.
        resume: whether to continue from the latest complete checkpoint in ``output_dir``, on any ranks and layout.

    Raises:
        ConfigError: settings contradict each other, the data or the number of ranks.
        DataError: a shard or its reference losses are missing, altered, or belong to other weights.
        CheckpointError: there is a run in ``output_dir`` already, or none to resume.
        Preempted: the job was asked to end, and has saved its work.
    """
    run.need("model", "train")
    settings: TrainConfig = run.need("train", "train")
    sources = load_sources(run.data, settings.split)
    ranks = join_ranks()
    ranks.first_does(lambda: require_monitors(run.monitor))
    output = Path(run.output_dir)

    def lost(message: str) -> None:
        write_end(output, ranks.rank, "lost_host", message)

    with (
        PreemptionNotice() as notice,
        JobRecord(output, ranks) as record,
        watch_hosts(ranks, run.monitor.heartbeat_seconds, status=output / STATUS_FILE, on_lost=lost) or nullcontext(),
        Watchdog(run.monitor.hang_seconds, output / "stacks", ranks.rank) as watchdog,
    ):
        return _train(run, sources, ranks, watchdog, record, notice=notice, resume=resume)


def _train(
    run: RunConfig,
    sources: Sequence[Source],
    ranks: Ranks,
    watchdog: Watchdog,
    record: JobRecord,
    *,
    notice: PreemptionNotice,
    resume: Resume,
) -> LoopState:
    """Check all, build the engine and let the loop run."""
    model: ModelConfig = run.need("model", "train")
    settings: TrainConfig = run.need("train", "train")
    data = sources[0].folder
    layout = build_layout(ranks, settings.stages)
    private = settings.engine == "opacus"
    deepspeed_config = {} if private else training_config(settings, layout.data_parallel.world_size)
    saved = _checkpoint_to_resume(Path(run.output_dir) / CHECKPOINTS, ranks=ranks, resume=resume)
    require_reference(run)
    if saved is not None:
        ranks.first_does(lambda: _require_same_settings(run))
    stream, validation = ranks.together(lambda: open_streams(run, sources, (settings.split, "validation"), ranks))
    if private:
        secret_seed = ranks.from_first(secrets.randbits(62))
        stream = ranks.together(lambda: draw_documents(run, settings, stream, secret_seed))
    total_steps = _count_and_tell(run, settings, len(stream), ranks)
    reference_folder = _check_reference(run.reference, data, ranks)
    adapters = _prepare_adapters(run, model, data, deepspeed_config, ranks)
    folder = write_start_folder(run, model, sources, adapters, ranks, resumed=saved is not None)
    record.begin(total_steps)
    reference = _frozen_reference(run.reference, reference_folder, layout)
    account = _privacy_account(run.privacy, stream, total_steps, ranks)
    engine = build_engine(
        folder,
        model,
        settings,
        config=deepspeed_config,
        objective=build_objective(run.loss, run.selection, run.goldfish),
        total_steps=total_steps,
        layout=layout,
        adapters=adapters,
        account=account,
        seed=run.seed,
    )
    if run.reference is not None and run.reference.mode == "adapter":
        reference = _adapter_reference(engine, adapters)
    state = LoopState(blocks=blocks_digest(*(source.manifest for source in sources)))
    peak = efficiency(run, Path(run.output_dir) / START_FOLDER, data.manifest.block_length, ranks)
    loop = TrainingLoop(run, engine, stream, validation, total_steps, state, reference, watchdog, peak, notice)
    if saved is not None:
        loop.resume(saved)
    else:
        engine.check(next(loop.batches()), settings.precision)
    try:
        return loop.fit()
    finally:
        if account is not None and ranks.is_first:
            account.write(Path(run.output_dir), loop.state.step)
        if reference is not None:
            reference.close()


def _frozen_reference(reference: ReferenceConfig | None, folder: Path | None, layout: Layout) -> LiveReference | None:
    """Build a reference with a model of its own that computes while training, where the run asks for one."""
    if reference is None or folder is None:
        return None
    return build_reference(reference, folder, layout)


def _adapter_reference(engine: TrainingEngine, adapters: Adapters | None) -> LiveReference:
    """Return the reference that is the model in training under other adapters."""
    module = engine.model
    assert adapters is not None
    assert isinstance(module, nn.Module)
    return AdapterReference(engine.token_losses, lambda: adapters.as_reference(module))


def _privacy_account(
    privacy: PrivacyConfig | None, stream: TrainingStream, total_steps: int, ranks: Ranks
) -> PrivacyAccount | None:
    """Return noise and clipping of DP-SGD, planned for the run's budget; None for other engines."""
    if privacy is None or not isinstance(stream, PoissonDocuments):
        return None
    if ranks.is_first and (note := slowness(privacy)):
        print_to_stderr(f"dualtok: {note}")
    return PrivacyAccount.plan(
        privacy, rate=stream.rate, steps=total_steps, documents=len(stream), truncated=stream.truncated
    )


def draw_documents(run: RunConfig, settings: TrainConfig, stream: TrainingStream, secret_seed: int) -> PoissonDocuments:
    """Return what DP-SGD learns from: a split's documents, drawn anew for every step.

    ``secret_seed``, the same on all ranks, is of use if ``privacy.secret_seed`` asks for it.

    Raises:
        DataError: there are fewer documents than ``train.batch_size``.
    """
    assert run.privacy is not None
    assert isinstance(stream, BlockStream)
    seed = secret_seed if run.privacy.secret_seed else run.seed
    return PoissonDocuments(stream, batch_size=settings.batch_size, parts=settings.gradient_accumulation, seed=seed)


def _count_and_tell(run: RunConfig, settings: TrainConfig, blocks: int, ranks: Ranks) -> int:
    """Return the optimizer steps; say how far the last one goes beyond ``train.epochs``, and what nobody measured."""
    steps = count_steps(settings, blocks)
    if ranks.is_first and (note := warning_of(run)):
        print_to_stderr(f"dualtok: {note}")
    if settings.epochs is None or settings.engine == "opacus" or not ranks.is_first:
        return steps
    beyond = steps * settings.batch_size - round(settings.epochs * blocks)
    if beyond > 0:
        print(
            f"dualtok: train.epochs {settings.epochs:g}: {steps} steps of {settings.batch_size}; the last one takes "
            f"{beyond} blocks of one more pass over {blocks}",
            file=sys.stderr,
            flush=True,
        )
    return steps


def open_streams(
    run: RunConfig, sources: Sequence[Source], splits: Sequence[str], ranks: Ranks
) -> list[TrainingStream]:
    """Open the streams of some splits with the run's reference losses, if it has any.

    The first split is the one to train on; ``data.mix`` is mixed into it, each folder with its own reference losses.
    """
    main = sources[0].folder
    for split in splits:
        main.entry(split)
    reference = run.reference
    expected: Fingerprint | None = None
    scored: tuple[str, ...] = ()
    if reference is not None and not reference.is_live:
        scored = reference.splits
        expected = ranks.first_does(lambda: reference_fingerprint(reference, main.manifest))
        if splits[0] not in reference.splits:
            raise ConfigError(
                f"reference.splits: has no {splits[0]!r}, which this run trains on; add it and score again"
            )

    def open_split(folder: DataFolder, split: str) -> BlockStream:
        losses: StoredLosses | None = None
        shared = {"on_bad_shard": run.data.on_bad_shard}
        if expected is not None and split in scored:
            own = replace(expected, blocks=blocks_digest(folder.manifest))
            losses = StoredLosses(folder, split, own, rank=ranks.rank, world_size=ranks.world_size, **shared)
        return folder.open(
            split,
            seed=run.seed,
            losses=losses,
            verify_rank=ranks.rank,
            verify_world_size=ranks.world_size,
            leave_out=run.train.leave_out if run.train is not None and split == splits[0] else None,
            **shared,
        )

    trained, *others = (open_split(main, split) for split in splits)
    if len(sources) == 1:
        return [trained, *others]
    mixed = [trained, *(open_split(source.folder, splits[0]) for source in sources[1:])]
    return [Mixture(mixed, [source.weight for source in sources], seed=run.seed), *others]


def _check_reference(reference: ReferenceConfig | None, data: DataFolder, ranks: Ranks) -> Path | None:
    """Return the folder of a reference that has a model of its own and computes while training."""
    if reference is None or reference.mode in ("stored", "adapter"):
        return None
    return Path(ranks.first_does(lambda: check_reference(reference, data)))


def _prepare_adapters(
    run: RunConfig, model: ModelConfig, data: DataFolder, deepspeed_config: Json, ranks: Ranks
) -> Adapters | None:
    """Check the run's adapters against its base model."""
    kind = model.adapter
    if kind is None:
        return None
    if model.quantize is not None and zero_stage(deepspeed_config) == 3:
        raise ConfigError(
            "model.quantize: ZeRO stage 3 cannot partition weights in 4 bits; use a DeepSpeed JSON of stage 0 to 2"
        )
    adapter = run.reference.adapter if run.reference is not None else None
    base = model.path or str(Path(run.output_dir) / START_FOLDER)

    def prepare() -> Adapters:
        vocabulary = vocabulary_size(data.tokenizer)
        return prepare_adapters(kind, starting_config(model, vocabulary), seed=run.seed, base=base, reference=adapter)

    return ranks.together(prepare)


def _checkpoint_to_resume(root: Path, *, ranks: Ranks, resume: Resume) -> SavedCheckpoint | None:
    """Return the checkpoint to continue from, or None for a fresh start; never mix two runs in one folder."""
    there = ranks.first_does(lambda: any(root.glob(f"step-*/{COMPLETE}")))
    if resume == "always" or (resume == "if_any" and there):
        return find_checkpoint(root, "latest", ranks)
    if there:
        raise CheckpointError(f"{root}: holds checkpoints of an earlier run; pass --resume, or change output_dir")
    return None


def _require_same_settings(run: RunConfig) -> None:
    """Refuse to continue a run under settings that would make it another one.

    Raises:
        ConfigError: names the setting and both values.
    """
    path = Path(run.output_dir) / RUN_FILE
    if not path.is_file():
        return
    stored, _ = with_new_names(yaml.safe_load(path.read_text(encoding="utf-8")))
    for key, earlier, now in changes(stored, run.as_dict()):
        raise ConfigError(
            f"{key}: {now!r}, but the run to resume in {run.output_dir} has {earlier!r}; resume with its settings, or "
            "start another run"
        )
