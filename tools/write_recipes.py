"""Write ``launch/``: what ``dualtok launch`` writes for default settings, as recipes that take their run at the start.

python tools/write_recipes.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dualtok.config.launch import DeepSpeedLaunchConfig, KubernetesConfig, LaunchConfig, SlurmConfig
from dualtok.launch.deepspeed import deepspeed
from dualtok.launch.job import Job, render
from dualtok.launch.kubernetes import k8s
from dualtok.launch.mpi import mpi
from dualtok.launch.slurm import slurm
from dualtok.launch.torchrun import torchrun

FOLDER = Path(__file__).resolve().parent.parent / "launch"


def recipes() -> dict[str, str]:
    """Return name and text of every recipe, for two hosts of eight accelerators unless it is for one host alone."""
    job = Job(2, 8, LaunchConfig(hostfile="hostfile"))
    starts = [
        torchrun(replace(job, settings=LaunchConfig(master="localhost"))),
        mpi(Job(1, 8, LaunchConfig())),  # without a hostfile: one host, or those of a scheduler's job
        *(deepspeed(_with(job, deepspeed=DeepSpeedLaunchConfig(remote))) for remote in ("pdsh", "ssh")),
        *(slurm(_with(job, slurm=SlurmConfig(start))) for start in ("ranks", "torchrun", "mpi")),
        *(k8s(_with(job, k8s=KubernetesConfig(kind))) for kind in ("PyTorchJob", "MPIJob")),
    ]
    one_host = replace(job, nodes=1, settings=LaunchConfig(), logs="")
    return {
        **{
            f"{start}.sh": render("one_host.sh.j2", one_host, recipe=f"launch/{start}.sh", start=start)
            for start in ("torchrun", "deepspeed")
        },
        **{name: text for start in starts for name, text in start.files.items()},
    }


def _with(job: Job, **sections: DeepSpeedLaunchConfig | SlurmConfig | KubernetesConfig) -> Job:
    return replace(job, settings=replace(job.settings, **sections))


def main() -> None:
    """Write every recipe, executable where it is a script."""
    for name, text in recipes().items():
        path = FOLDER / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644 if name.endswith(".yaml") else 0o755)


if __name__ == "__main__":
    main()
