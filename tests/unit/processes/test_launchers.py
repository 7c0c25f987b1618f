"""What each launcher's environment means, and which leftovers are refused at once."""

from __future__ import annotations

import pytest

from nvlm.config.values import ConfigError
from nvlm.processes.launchers import check_allocation, find_task, first_node

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
BATCH = {  # of an sbatch script: a rank and a number of tasks, and no step
    "SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[003-004]",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}  # fmt: skip
ONE_NODE = BATCH | {"SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-host-1@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
LOCAL = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"}

TASKS = {
    "torchrun": (TORCHRUN, ("torchrun", 5, 8, 1, "a", 29500)),
    "torchrun with one process": (
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        ("torchrun", 0, 1, 0, "a", 29500),
    ),
    "torchrun in each of srun's tasks": (STEP | TORCHRUN, ("torchrun", 5, 8, 1, "a", 29500)),
    "by hand, in srun's tasks": (
        STEP | {"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        ("RANK and WORLD_SIZE", 9, 16, 1, "a", 1),
    ),
    "srun": (STEP, ("srun", 9, 16, 1, "gpu003", 20077)),
    "srun --mpi=pmi2": (STEP | {"PMI_RANK": "9", "PMI_SIZE": "16"}, ("srun", 9, 16, 1, "gpu003", 20077)),
    "srun --mpi=pmix": (STEP | {"PMIX_RANK": "9"}, ("srun", 9, 16, 1, "gpu003", 20077)),
    "srun with a meeting place": (
        STEP | {"MASTER_ADDR": "b", "MASTER_PORT": "4"},
        ("srun", 9, 16, 1, "b", 4),
    ),
    "srun's second step takes another port": (STEP | {"SLURM_STEP_ID": "1"}, ("srun", 9, 16, 1, "gpu003", 20078)),
    "a step of fewer tasks than the job": (
        STEP | {"SLURM_STEP_NUM_TASKS": "10", "SLURM_NTASKS": "16"},
        ("srun", 9, 10, 1, "gpu003", 20077),
    ),
    "mpirun": (OPEN_MPI | {"MASTER_PORT": "7"}, ("mpirun", 3, 4, 3, "127.0.0.1", 7)),
    "mpirun inside an allocation": (
        # It brings its daemons to the nodes by srun, whose variables its ranks inherit.
        STEP | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "MASTER_PORT": "7"},
        ("mpirun", 3, 4, 3, "127.0.0.1", 7),
    ),
    "mpirun over machines": (
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "c", "MASTER_PORT": "7"},
        ("mpirun", 3, 4, 3, "c", 7),
    ),
    "MPICH": (MPICH | {"MASTER_PORT": "7"}, ("mpirun", 1, 2, 1, "127.0.0.1", 7)),
    "submitit without Slurm": (LOCAL | {"MASTER_PORT": "7"}, ("submitit", 1, 2, 1, "127.0.0.1", 7)),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_knows_its_place(name):
    environment, expected = TASKS[name]
    task = find_task(environment)
    assert (task.launcher, task.rank, task.world, task.local_rank, task.address, task.port) == expected
    again = find_task(environment | task.variables())  # the variables for torch mean the same
    assert (again.rank, again.world, again.local_rank, again.address, again.port) == expected[1:]


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH, LOCAL])
def test_all_ranks_find_the_same_port(launcher):
    rank = next(name for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SUBMITIT_LOCAL_GLOBALID") if name in launcher)
    assert find_task(launcher).port == find_task(launcher | {rank: "0", "PMIX_RANK": "0"}).port


ALONE = {
    "a shell": {},
    "one process is one process": {"RANK": "0", "WORLD_SIZE": "1"},
    "a rank of 0 alone": {"RANK": "0"},
    "the batch script of one node": ONE_NODE,
    "the shell of salloc on a node": ONE_NODE | {"SLURM_STEP_ID": str(0xFFFFFFFA)},
    "the batch script, numbered": ONE_NODE | {"SLURM_STEP_ID": str(0xFFFFFFFB)},
    "one task of srun": STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    "one rank of mpirun": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "one rank of MPICH": {"PMI_RANK": "0", "PMI_SIZE": "1"},
    "a meeting place alone": {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
}


@pytest.mark.parametrize("name", ALONE)
def test_whoever_was_started_alone_starts_workers(name):
    assert find_task(ALONE[name]) is None
    check_allocation(ALONE[name], "python")


REFUSED = {
    "no meeting place": ({"RANK": "1", "WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE, or start it with torchrun"),
    "no number of processes": ({"RANK": "1"}, "without WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
    "no rank": ({"WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "without RANK"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "without MASTER_PORT"),
    "a rank beyond the others": (TORCHRUN | {"RANK": "8"}, "expected 0 to 7, below WORLD_SIZE=8"),
    "not a number": (TORCHRUN | {"RANK": "$SLURM_PROCID"}, "RANK: got '$SLURM_PROCID', expected a number"),
    "empty": (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE: got '', expected a number"),
    "a port that is none": (TORCHRUN | {"MASTER_PORT": "70000"}, "1 to 65535"),
    "no place on the machine": (
        {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
        "without LOCAL_RANK",
    ),
    "left over in front of srun": (
        STEP | {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "RANK=0 and WORLD_SIZE=16 in task 9 of 16",
    ),
    "left over from one process": (
        STEP | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "unset RANK WORLD_SIZE in front of srun",
    ),
    "left over in front of mpirun": (
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "in task 3 of 4",
    ),
    "mpirun over machines": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR="),
    "MPI without a number": ({"PMIX_RANK": "0"}, "no number of processes"),
    "srun without nodes": (
        {name: value for name, value in STEP.items() if "NODELIST" not in name},
        "export MASTER_ADDR=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_wait_for_nobody_is_refused(name):
    environment, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        find_task(environment)
    assert words in str(caught.value)
    assert "Fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_script_of_several_nodes_is_told_to_use_srun():
    assert find_task(BATCH) is None
    for environment in (BATCH, BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}):
        with pytest.raises(ConfigError, match="Fix: srun python launch/train.py seed=2$"):
            check_allocation(environment, "python launch/train.py seed=2")
    check_allocation(STEP, "python")
    check_allocation(BATCH | TORCHRUN, "python")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[003-005,9],cpu1", "gpu003"), ("r[1-2]n[07,9]-ib", "r1n07-ib"), ("n-1,n-2", "n-1")],
)
def test_the_first_node_of_slurm_s_lists(nodes, first):
    assert first_node(nodes) == first
