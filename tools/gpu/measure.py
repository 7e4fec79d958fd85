"""The measurements of the check of a machine; each runs in a process of its own and returns plain figures."""

from __future__ import annotations

import os
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from benchmark_support import prepared_corpus
from contenders import DEVICE, hugging_face_trainer, naive_dual_step, training_loop, training_step
from gpu.sizes import WARM_UP, Sizes, sizes_here
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from dualtok.commands.score.run import score
from dualtok.config.model import LoraConfig, ModelConfig
from dualtok.config.reference import ReferenceConfig
from dualtok.config.run import RunConfig
from dualtok.config.train import TrainConfig
from dualtok.data.folder import DataFolder
from dualtok.model.load import DTYPES
from dualtok.model.loss_backends import load_backend
from dualtok.objective.chunked_cross_entropy import linear_cross_entropy
from dualtok.objective.head import LossHead
from dualtok.train.metrics import peak_memory_gib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dualtok.config.data import DataConfig

Figures = dict[str, Any]
BUDGETS = {"torch 256 MiB": 256, "torch 1 GiB": 1024, "torch 4 GiB": 4096}
"""dualtok's own loss -> its memory for logits in MiB."""
HEADS = ("hugging_face", *BUDGETS, "cut_cross_entropy", "liger")
STEPS = ("trainer", "naive", "plain", "dual", "resident", "offload", "cpu", "lora_plain", "adapter")


def synchronise() -> None:
    """Wait until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def prepare(folder: Path) -> None:
    """Write what the other measurements share: blocks, and the models' weights."""
    sizes = sizes_here()
    for length in {sizes.block_length, 128}:
        prepared_corpus(folder, length, sizes.passages)
    for seed, name in enumerate(("start", "reference")):
        _save(folder / name, sizes.model, seed, sizes.block_length)
        _save(folder / f"small-{name}", sizes.small | {"vocab_size": 4096}, seed, 2048)


def _save(folder: Path, shape: dict[str, int], seed: int, positions: int) -> None:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **shape, max_position_embeddings=positions, tie_word_embeddings=False)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(DTYPES[sizes_here().precision]).save_pretrained(folder)


def machine() -> Figures:
    """Return the device's name, the versions, and the speed of a matrix product and a copy."""
    sizes = sizes_here()
    dtype = DTYPES[sizes.precision]
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=DEVICE, dtype=dtype) for _ in range(2))
    product = statistics.median(_seconds(lambda: a @ b, sizes.repeats))
    copy = statistics.median(_seconds(a.clone, sizes.repeats))
    cuda = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "matrix_tflops": 2 * sizes.matrix**3 / product / 1e12,
        "copy_gb_per_s": 2 * a.numel() * a.element_size() / copy / 1e9,
    }


def _seconds(function: Callable[[], object], repeats: int, warm_up: int = WARM_UP) -> list[float]:
    times = []
    for _ in range(warm_up + repeats):
        synchronise()
        started = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def head(method: str) -> Figures:
    """Check a loss backend, and time its forward and backward pass with the dual loss's weights.

    ``hugging_face`` is the plain loss over full logits. The memory is what the pass needs beyond weights and gradients.
    """
    sizes = sizes_here()
    tokens, hidden, vocabulary = sizes.head
    dtype = DTYPES[sizes.precision]
    torch.manual_seed(0)
    layer = nn.Linear(hidden, vocabulary, bias=False, device=DEVICE, dtype=dtype)
    states = torch.randn(1, tokens, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens), device=DEVICE)
    weights = torch.zeros(1, tokens, device=DEVICE)
    order = torch.randperm(tokens, device=DEVICE)
    learned, used = int(0.6 * tokens), int(0.8 * tokens)
    weights[0, order[:learned]] = 1 / learned
    weights[0, order[learned:used]] = -0.8 / (used - learned)
    kernel: Any = partial(linear_cross_entropy, memory_mib=BUDGETS.get(method))
    if method != "hugging_face" and method not in BUDGETS:
        config = AutoConfig.for_model("llama", **sizes.small, vocab_size=64)
        kernel = load_backend(method, AutoModelForCausalLM.from_config(config), DEVICE, sizes.precision)
    loss_head = LossHead(layer, kernel=kernel)

    def forward_backward() -> None:
        layer.weight.grad = states.grad = None
        if method == "hugging_face":
            ForCausalLMLoss(layer(states), labels, vocabulary, shift_labels=labels).backward()
        else:
            (loss_head(states, labels) * weights).sum().backward()

    forward_backward()
    before = _reset_peak()
    seconds = _seconds(forward_backward, sizes.repeats)
    gib = None if before is None else torch.cuda.max_memory_allocated() / 2**30 - before
    return {"seconds": statistics.median(seconds), "gib": gib, "shape": sizes.head}


def _reset_peak() -> float | None:
    """Start the peak anew and return the GiB in use; None without an accelerator, whose peak can be reset."""
    if DEVICE.type != "cuda":
        return None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def step(contender: str, folder: Path) -> Figures:
    """Time one way of training, some steps after a warm-up."""
    sizes = sizes_here()
    data = prepared_corpus(folder, sizes.block_length, sizes.passages)
    train = TrainConfig(
        learning_rate=1e-5,
        batch_size=sizes.batch_size,
        steps=10**6,
        precision="bf16" if sizes.precision == "bf16" else "fp32",
    )
    phases: dict[str, float] = {}
    if contender == "trainer":
        seconds = _time_trainer(folder, data, train, sizes)
    elif contender == "naive":
        stream = DataFolder(data.dir).open("train")
        seconds = _seconds(naive_dual_step(folder / "start", folder / "reference", stream, train), sizes.repeats)
    else:
        seconds, phases = _time_own_step(configured(contender, folder, data, train), sizes)
    return {
        "seconds": statistics.median(seconds),
        "mean": statistics.fmean(seconds),
        "phases": phases,
        "range": [min(seconds), max(seconds)],
        "peak_gib": peak_memory_gib(DEVICE),
        "tokens": sizes.batch_size * sizes.block_length,
    }


def _time_trainer(folder: Path, data: DataConfig, train: TrainConfig, sizes: Sizes) -> list[float]:
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            marks.append(time.perf_counter())

    steps = WARM_UP + sizes.repeats
    stream = DataFolder(data.dir).open("train")
    trainer = hugging_face_trainer(folder / "start", stream, train, steps, str(folder))
    trainer.add_callback(Clock())
    trainer.train()
    return [after - before for before, after in zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False)]


def _time_own_step(run: RunConfig, sizes: Sizes) -> tuple[list[float], dict[str, float]]:
    """Return the seconds of each step, and of each phase of a step by the run's own timer, on average."""
    if run.reference is not None and run.reference.mode == "stored":
        score(run)
    loop = training_loop(run)
    run_one = training_step(loop)
    _seconds(run_one, 0)
    loop.engine.timer.take()
    seconds = _seconds(run_one, sizes.repeats, warm_up=0)
    times = loop.engine.timer.take()
    return seconds, {name: passed / times.steps for name, passed in times.phases.items()}


def configured(contender: str, folder: Path, data: DataConfig, train: TrainConfig) -> RunConfig:
    """Return the run of one of dualtok's own contenders."""
    lora = LoraConfig(rank=16) if contender in ("lora_plain", "adapter") else None
    reference: ReferenceConfig | None = None
    if contender == "adapter":
        reference = ReferenceConfig(mode="adapter")
    elif contender == "cpu":  # a large model on host cores would take many times a step
        reference = ReferenceConfig(model=str(folder / "small-reference"), mode="cpu", threads=os.cpu_count())
    elif contender == "dual":
        reference = ReferenceConfig(model=str(folder / "reference"), precision=train.precision)
    elif contender in ("resident", "offload"):
        reference = ReferenceConfig(
            model=str(folder / "reference"),
            precision=train.precision,
            mode="resident" if contender == "resident" else "offload",
        )
    return RunConfig(
        data=data,
        output_dir=str(folder / f"step-{contender}"),
        train=train,
        reference=reference,
        objective="causal_lm" if reference is None else "dual",
        model=ModelConfig(path=str(folder / "start"), lora=lora),
    )
