"""Faults in what carries the science: engines, checkpoints, plans, monitoring, launching, settings and files."""

from __future__ import annotations

from mutations.fault import Fault

CHECKPOINT, FILES_OF_IT = "dualtok/engine/checkpoint.py", "dualtok/engine/checkpoint_files.py"
DEEPSPEED, GUARD = "dualtok/engine/deepspeed_config.py", "dualtok/engine/guard.py"
HEARTBEAT, HOSTFILE = "dualtok/engine/heartbeat.py", "dualtok/launch/hostfile.py"
LOOP, STATES, PRIVATE = "dualtok/engine/loop.py", "dualtok/engine/states.py", "dualtok/engine/private.py"
MEMORY, TRAFFIC = "dualtok/plan/memory.py", "dualtok/plan/traffic.py"
RANK_TABLE, RUN = "dualtok/monitor/ranks.py", "dualtok/run.py"
OF_CHECKPOINT, OF_DEEPSPEED = ("tests/engine/test_checkpoint.py",), ("tests/engine/test_deepspeed_config.py",)
OF_GUARD, OF_PRIVATE = ("tests/engine/test_guard.py",), "tests/engine/test_private.py"
OF_MEMORY, OF_TRAFFIC = "tests/plan/test_memory.py", "tests/plan/test_traffic.py"
OF_RANK_TABLE, OF_RUN, OF_START = ("tests/monitor/test_ranks.py",), ("tests/test_run.py",), "tests/launch/test_start.py"
# Launches: only a whole run sees these.
RESUMED = ("tests/distributed/test_resume.py::test_an_interrupted_run_continues_exactly",)
TWO_RANKS = ("tests/distributed/test_loss_head.py",)
GUARDED = ("tests/distributed/test_guard.py",)
OF_OPTIMIZER = ("tests/engine/test_optimizer.py",)

PLUMBING: tuple[Fault, ...] = (
    Fault(
        "clipping-off", DEEPSPEED, '(train.gradient_clipping, "train.gradient_clipping")',
        '(0.0, "train.gradient_clipping")', "gradients are not clipped", OF_DEEPSPEED,
    ),
    Fault(
        "accumulation", DEEPSPEED, '(train.gradient_accumulation, "train.gradient_accumulation")',
        '(1, "train.gradient_accumulation")', "DeepSpeed steps after every micro-batch", OF_DEEPSPEED,
    ),
    Fault(
        "micro-batch-of-a-rank", DEEPSPEED, "            micro_batch // world_size,\n", "            micro_batch,\n",
        "each rank is told to take the whole micro-batch", OF_DEEPSPEED,
    ),
    Fault(
        "accumulated-in-bf16", DEEPSPEED, '            "fp32",\n            "dualtok accumulates',
        '            "bf16",\n            "dualtok accumulates', "small gradients drown in bf16", OF_DEEPSPEED,
    ),
    Fault(
        "wrong-deepspeed", DEEPSPEED, "if first <= Version(installed) < mended:",
        "if first < Version(installed) < mended:", "the first DeepSpeed with wrong gradients is accepted", OF_DEEPSPEED,
    ),
    Fault(
        "contradiction-accepted", DEEPSPEED, 'if given in ("auto", decided):', 'if given != "":',
        "a DeepSpeed JSON that contradicts the run is accepted", OF_DEEPSPEED,
    ),
    Fault(
        "complete-not-checked", FILES_OF_IT, "if not (folder / COMPLETE).is_file():", "if not folder.is_dir():",
        "a checkpoint that was interrupted counts", OF_CHECKPOINT,
    ),
    Fault(
        "crc-not-compared", FILES_OF_IT, "return checksum == entry.crc32", "return checksum >= 0",
        "an altered checkpoint is taken for sound", OF_CHECKPOINT,
    ),
    Fault(
        "values-shifted", FILES_OF_IT, "[begin - first : end - first]", "[begin - start : end - start]",
        "a rank that begins elsewhere reads other values", OF_CHECKPOINT,
    ),
    Fault(
        "oldest-kept", CHECKPOINT, "*complete[-keep:]", "*complete[:keep]", "the oldest checkpoints are kept",
        OF_CHECKPOINT,
    ),
    Fault(
        "best-not-kept", CHECKPOINT, "_pointed(root, BEST), *complete", "*complete", "the best checkpoint is removed",
        OF_CHECKPOINT,
    ),
    Fault(
        "background-failure", CHECKPOINT, "                self._failure = error\n",
        "                self._failure = None if error else error\n",
        "a checkpoint that could not be written in the background is not missed", OF_CHECKPOINT,
    ),
    Fault(
        "schedule-after-resume", STATES, '"last_epoch": steps - skipped - 1,', '"last_epoch": steps - skipped,',
        "the learning rate is one step ahead after a resume", RESUMED,
    ),
    Fault(
        "moments-after-resume", STATES, "self._fresh_moments(flat, steps - skipped)", "self._fresh_moments(flat, 0)",
        "Adam corrects its moments after a resume as if they were new", RESUMED,
    ),
    Fault(
        "data-after-resume", LOOP, "self.state.samples_seen += self.train.batch_size",
        "self.state.samples_seen += self.train.batch_size // 2", "a resumed run reads blocks again", RESUMED,
    ),
    Fault(
        "bad-step-not-seen", LOOP, 'left_out = "nan"', "left_out = None", "a loss that is not finite goes on",
        ("tests/engine/test_divergence.py::test_a_loss_that_is_not_finite_stops_the_run",),
    ),
    Fault(
        "figures-of-one-rank", "dualtok/engine/metrics.py",
        "ranks.sum(torch.cat([self._sums, self._asked_to_end, self._skipped_blocks]))",
        "torch.cat([self._sums, self._asked_to_end, self._skipped_blocks])",
        "a NaN on one rank is not told to the others", GUARDED,
    ),
    Fault(
        "limit-of-one-rank", GUARD, "self._ranks.sum(self._sums).tolist()", "self._sums.tolist()",
        "each rank judges a spike by its own tokens", GUARDED,
    ),
    Fault(
        "guard-never", GUARD, "math.nan if count and total / count > self._limit else 1.0", "1.0",
        "a spike is never left out", OF_GUARD,
    ),
    Fault(
        "guard-patience", GUARD, "> self.config.patience", ">= self.config.patience",
        "the run ends one bad step early", OF_GUARD,
    ),
    Fault(
        "guard-mean", GUARD, "statistics.median(self.losses)", "statistics.fmean(self.losses)",
        "one high loss raises the limit", OF_GUARD,
    ),
    Fault(
        "warm-up", "dualtok/engine/optimizer.py", "num_warmup_steps=train.warmup_steps",
        "num_warmup_steps=train.warmup_steps + 1", "the warm-up takes one step more", OF_OPTIMIZER,
    ),
    Fault(
        "decay-of-vectors",
        "dualtok/engine/optimizer.py", '"weight_decay": 0.0}', '"weight_decay": train.weight_decay}',
        "norms and biases decay", OF_OPTIMIZER,
    ),
    Fault(
        "gathered-offset", "dualtok/engine/distributed.py", "sum(counts[: self.rank])", "sum(counts[: self.rank + 1])",
        "each rank takes the next one's selection", TWO_RANKS,
    ),
    Fault(
        "gathered-padding", "dualtok/engine/distributed.py", "torch.cat([part[:count] for part, count",
        "torch.cat([part for part, count", "what pads a shorter rank is ranked too", TWO_RANKS,
    ),
    Fault(
        "lost-after-stopping", HEARTBEAT, "self._longest, self._looked = 2 * pause,",
        "self._longest, self._looked = 1e9 * pause,", "a process that was stopped takes the others for lost",
        ("tests/engine/test_heartbeat.py::test_a_process_that_was_stopped_itself_blames_nobody",),
    ),
    Fault(
        "heartbeat-threshold", HEARTBEAT, "if silence.seconds > self._seconds}",
        "if silence.seconds > self._seconds / 3}",
        "a late host is lost", ("tests/engine/test_heartbeat.py::test_a_late_host_and_one_that_leaves_are_not_lost",),
    ),
    Fault(
        "watchdog-status", "dualtok/engine/watchdog.py", "os._exit(HUNG)", "os._exit(0)", "a hang ends with success",
        ("tests/engine/test_watchdog.py",),
    ),
    Fault(
        "watchdog-deaf", "dualtok/engine/watchdog.py", "self._last, self._doing = time.monotonic(), doing",
        "self._doing = doing", "a rank that goes on is taken for hung", ("tests/engine/test_watchdog.py",),
    ),
    Fault(
        "documents-not-clipped", PRIVATE, "(factors * per_document).sum()", "per_document.sum()",
        "DP-SGD does not clip", (f"{OF_PRIVATE}::test_a_step_follows_the_clipped_gradients_of_single_documents",),
    ),
    Fault(
        "noise-repeats", PRIVATE, "self.seed * 1_000_003 + self.engine.global_steps", "self.seed * 1_000_003",
        "each step draws the same noise", (f"{OF_PRIVATE}::test_noise_follows_the_seed_and_the_step",),
    ),
    Fault(
        "privacy-spent", "dualtok/engine/privacy.py", "[(self.noise_multiplier, self.sample_rate, steps)]",
        "[(self.noise_multiplier, self.sample_rate, 1)]", "only the first step is accounted for",
        (f"{OF_PRIVATE}::test_epsilon_is_opacus_own",),
    ),
    Fault(
        "memory-of-the-optimiser", MEMORY, "Bytes(2 * STATE * whole)", "Bytes(STATE * whole)",
        "one of Adam's moments is forgotten", (f"{OF_MEMORY}::test_the_model_states_of_two_ranks",),
    ),
    Fault(
        "memory-in-flight", MEMORY, "min(job.stages - stage, job.micro_batches)", "min(job.stages, job.micro_batches)",
        "each stage holds as much as the first",
        (f"{OF_MEMORY}::test_a_stage_holds_the_activations_of_the_micro_batches_in_flight",),
    ),
    Fault(
        "memory-not-padded", MEMORY, "sum(math.ceil(size / job.replicas) for size in held)  # each",
        "sum(held) // job.replicas  # each", "ZeRO-3's padding is forgotten",
        (f"{OF_MEMORY}::test_each_parameter_is_padded_to_the_ranks_at_stage_3",),
    ),
    Fault(
        "flops-frozen", "dualtok/plan/flops.py", "(4 if frozen else 6)", "6",
        "gradients of frozen weights are counted", ("tests/plan/test_flops.py",),
    ),
    Fault(
        "traffic-all-reduce", TRAFFIC, "reduced = 2 * w * elements", "reduced = w * elements",
        "an all-reduce counts as a reduce-scatter", (f"{OF_TRAFFIC}::test_three_micro_batches_on_four_ranks",),
    ),
    Fault(
        "traffic-ring", TRAFFIC, "(replicas - 1) / replicas", "1.0", "a rank sends to itself",
        (f"{OF_TRAFFIC}::test_three_micro_batches_on_four_ranks",),
    ),
    Fault(
        "busy-phases", "dualtok/monitor/timing.py", "if around in (FORWARD, BACKWARD):",
        "if name in (FORWARD, BACKWARD):", "collectives within a pass are no work", ("tests/monitor/test_timing.py",),
    ),
    Fault(
        "phase-not-left", "dualtok/monitor/timing.py", "                self._open.pop()\n",
        "                self._open[-1:] = self._open[-1:]\n", "time after a phase counts for it",
        ("tests/monitor/test_timing.py",),
    ),
    Fault(
        "straggler", RANK_TABLE, "self.wall - self.phases[COMMUNICATION] - self.phases[PIPELINE]", "self.wall",
        "waiting makes a rank slow", OF_RANK_TABLE,
    ),
    Fault(
        "mfu-of-stages", RANK_TABLE, "for rank in self.ranks) / self.stages", "for rank in self.ranks)",
        "a pipeline's blocks count once per stage", OF_RANK_TABLE,
    ),
    Fault(
        "hosts-from-the-end", HOSTFILE, "list(slots.items())[:nodes]", "list(slots.items())[::-1][:nodes]",
        "the last hosts of a hostfile are taken", (f"{OF_START}::test_hosts_are_chosen_in_order",),
    ),
    Fault(
        "few-slots", HOSTFILE, "if count < gpus]", "if count < 0]", "a host gets more ranks than it has slots",
        (f"{OF_START}::test_hosts_are_chosen_in_order", f"{OF_START}::test_bad_input_is_refused_with_the_next_step"),
    ),
    Fault(
        "host-twice", HOSTFILE, "if match[1] in hosts:", "if match[1] in ():", "a host that is there twice is accepted",
        (f"{OF_START}::test_a_bad_hostfile_is_named",),
    ),
    Fault(
        "unknown-key", RUN, '@dataclass(config=ConfigDict(extra="forbid"))\nclass RunConfig:',
        '@dataclass(config=ConfigDict(extra="ignore"))\nclass RunConfig:', "an unknown section is passed over", OF_RUN,
    ),
    Fault(
        "key-twice", RUN, "if key in seen:", "if key in ():", "of a key that is there twice the last one counts",
        OF_RUN,
    ),
    Fault(
        "privacy-with-dual", RUN, 'if self.objective != "causal_lm":', 'if self.objective == "":',
        "DP-SGD accepts an objective that is not private",
        ("tests/distributed/test_private_training.py::test_what_is_not_private_is_refused",),
    ),
    Fault(
        "half-a-file", "dualtok/files.py", "        temporary.replace(path)\n    finally:\n        temporary.unlink",
        "    finally:\n        temporary.replace(path)\n        temporary.unlink",
        "a file half written takes its place",
        ("tests/test_files.py",),
    ),
    Fault(
        "exit-status", "dualtok/cli.py", "os._exit(2)", "os._exit(1)", "a user's error ends with status 1",
        ("tests/e2e/test_bad_input.py::test_a_bad_setting_is_named",),
    ),
)  # fmt: skip
