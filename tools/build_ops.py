"""Compile DeepSpeed's CPU operators ahead of the first run.

On a host without an accelerator DeepSpeed compiles its shared-memory collective when the first job starts. Interrupting
that job would leave a lock behind on which every later run waits; here it is done once, with nobody waiting.

    python tools/build_ops.py [ShareMemCommBuilder] [CPUAdamBuilder]
"""

from __future__ import annotations

import sys
import time


def main(names: list[str]) -> int:
    """Build the named operators if this host trains on its CPU; report how long each took."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        print("an accelerator is present: DeepSpeed's operators are compiled when they are first used")
        return 0
    for name in names or ["ShareMemCommBuilder"]:
        started = time.perf_counter()
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not builder.is_compatible():
            print(f"{name}: not available on this host")
            continue
        builder.load(verbose=False)
        print(f"{name}: ready after {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
