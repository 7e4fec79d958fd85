#!/bin/bash
# torch 2.13.0: the 2-norm of a long float32 vector in host memory is too small, and so are get_total_norm and what
# clip_grad_norm_ clips by: 8e-5 at 4 million elements, .5 % at 64 million.
#
# Input: torch.randn of 2^22 and 2^26 elements. Seen: "4,194,304 elements: -8.0e-05" and "67,108,864 elements: -5.1e-03",
# relative to the root of the sum of squares in float64.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy
"$work/env/bin/python" - <<'PYTHON'
import torch

for power, least in ((22, 1e-5), (26, 1e-3)):
    vector = torch.randn(1 << power, generator=torch.Generator().manual_seed(0))
    right = float(sum(chunk.double().square().sum() for chunk in vector.split(1 << 16)).sqrt())
    off = [float(norm) / right - 1 for norm in (vector.norm(), torch.nn.utils.get_total_norm([vector]))]
    print(f"{1 << power:,} elements: {off[0]:.1e}, get_total_norm {off[1]:.1e}")
    assert all(error < -least for error in off), "the behaviour has changed"
PYTHON
