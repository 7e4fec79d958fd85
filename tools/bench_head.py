"""How much memory the loss takes beyond what every loss needs: dualtok's head against Hugging Face's on full logits.

Each is measured in a process of its own, as the growth of the peak resident memory over one forward and backward pass
(the growth over the accelerator's own peak, where there is one) minus the gradients that both must hold. The weights of
the tokens are those of the dual loss: 60 % learned, 20 % unlearned, 20 % unused.

    python tools/bench_head.py [--tokens 4096] [--vocabulary 50257] [--hidden 256] [--precision fp32] [--memory-mib 256]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dualtok.model.load import DTYPES
from dualtok.objective.chunked_cross_entropy import LOSS_MEMORY_MIB, linear_cross_entropy
from dualtok.objective.head import LossHead

METHODS = ("hugging_face", "dualtok")


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("vocabulary", 50257), ("hidden", 256), ("memory-mib", LOSS_MEMORY_MIB)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--method", choices=METHODS, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options)))
        return
    results = {method: in_a_fresh_process(method) for method in METHODS}
    for method, result in results.items():
        print(f"{method}: {result['mib']:,.0f} MiB at the peak, {result['seconds']:.2f} s")
    ratio = results["dualtok"]["mib"] / results["hugging_face"]["mib"]
    print(f"head's peak extra memory, dualtok / Hugging Face: {ratio:.3f} = 1/{1 / ratio:.1f}")


def in_a_fresh_process(method: str) -> dict[str, float]:
    """Run this file with ``--method``; the peak of a process is never reset."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--method", method]
    result: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the extra memory in MiB and the seconds of a forward and backward pass."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[options.precision]
    layer = nn.Linear(options.hidden, options.vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(1, options.tokens, options.hidden, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, options.vocabulary, (1, options.tokens), device=device)
    weights = torch.zeros(1, options.tokens, device=device)
    order = torch.randperm(options.tokens, device=device)
    cuts = int(0.6 * options.tokens), int(0.8 * options.tokens)
    weights[0, order[: cuts[0]]] = 1 / cuts[0]
    weights[0, order[cuts[0] : cuts[1]]] = -0.8 / (cuts[1] - cuts[0])
    # The libraries' own buffers and threads are there before the measurement.
    nn.functional.cross_entropy(layer(hidden[0, :2]).float(), labels[0, :2]).backward()
    layer.weight.grad = hidden.grad = None

    before, started = peak_bytes(device), time.perf_counter()
    if options.method == "dualtok":

        def kernel(*inputs: torch.Tensor, scaling: object) -> torch.Tensor:
            return linear_cross_entropy(*inputs, scaling=scaling, memory_mib=options.memory_mib)

        (LossHead(layer, kernel=kernel)(hidden, labels) * weights).sum().backward()
    else:
        ForCausalLMLoss(layer(hidden), labels, options.vocabulary, shift_labels=labels).backward()
    seconds = time.perf_counter() - started
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in (layer.weight, hidden))
    return {"mib": (peak_bytes(device) - before - gradients) / 2**20, "seconds": seconds}


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in use by tensors of an accelerator, or resident in the host."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    main()
