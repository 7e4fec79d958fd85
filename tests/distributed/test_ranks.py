"""Who a rank is, from what its launcher says."""

from __future__ import annotations

import sys

import pytest

from dualtok.distributed.rendezvous import complete_environment
from dualtok.errors import ConfigError


def test_a_plain_start_is_a_job_of_one_rank() -> None:
    alone = complete_environment({})
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["LOCAL_RANK"]) == ("0", "1", "0")
    assert complete_environment({"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}).keys() == alone.keys()


def test_a_launcher_that_said_everything_is_left_alone() -> None:
    assert complete_environment({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) == {}


@pytest.mark.parametrize(
    "started", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}], ids=["mpirun", "srun"]
)
def test_ranks_of_mpi_need_mpi4py(started: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"MPI started this rank, but mpi4py cannot be used .* pip install mpi4py"):
        complete_environment(started)


def test_srun_without_mpi_is_refused_with_the_ways_that_work() -> None:
    with pytest.raises(ConfigError, match=r"each would train alone; .* `dualtok launch --backend slurm`"):
        complete_environment({"SLURM_STEP_NUM_TASKS": "4"})
