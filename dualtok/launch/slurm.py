"""A Slurm job that is warned before its end, writes a checkpoint and queues itself again."""

from __future__ import annotations

from dualtok.launch.job import Job, Start, render

SCRIPTS = {"ranks": "slurm_ranks.sbatch", "torchrun": "slurm_torchrun.sbatch", "mpi": "slurm_mpi.sbatch"}


def slurm(job: Job) -> Start:
    """Return the batch script."""
    start = job.settings.slurm.start
    name = SCRIPTS[start]
    text = render("slurm.sbatch.j2", job, recipe=f"launch/{name}", start=start)
    return Start({name: text}, ("sbatch", name), needs=("sbatch",))
