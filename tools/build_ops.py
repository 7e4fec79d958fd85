"""Compile DeepSpeed's CPU operators ahead of the first run.

On a host without an accelerator DeepSpeed compiles its shared-memory collective when the first job starts. Interrupting
that job would leave a lock behind on which every later run waits; here it is done once, with nobody waiting.

    python tools/build_ops.py [ShareMemCommBuilder] [CPUAdamBuilder]
"""

from __future__ import annotations

import sys

from dualtok.doctor.building import main as build


def main(names: list[str]) -> int:
    """Build the named operators if this host trains on its CPU; those that it cannot have are named."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        print("an accelerator is present: DeepSpeed's operators are compiled when they are first used")
        return 0
    build(names or ["ShareMemCommBuilder"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
