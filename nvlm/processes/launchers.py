"""Detects who started this process: torchrun, srun, mpirun or submitit as one of several tasks, or a shell.

It only reads the environment. Contradictory or incomplete variables are refused at once: otherwise the process would
wait for others that nobody started until the rendezvous times out. Imports no torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm.config.values import problem

# From this number on, Slurm's steps are special: the batch script, or the shell that salloc opens on a node.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_HERE = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One of `world` processes that a launcher started. Rank 0 listens at `address`, `port`."""

    launcher: str
    rank: int
    world: int
    local_rank: int  # within its machine
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The same as torch's environment variables."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        values = (self.rank, self.world, self.local_rank, self.address, self.port)
        return dict(zip(names, map(str, values)))


def find_task(environment: Mapping[str, str]) -> Task | None:
    """The task that this process is; None if it was started alone and so starts its own workers.

    Raises ConfigError if the variables contradict each other or are incomplete.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _by_torch(environment)
    for find in (_by_open_mpi, _by_pmi, _by_slurm, _by_submitit_local, _by_pmix):
        task = find(environment)
        if task is not None:
            return task if task.world > 1 else None
    return None


def check_allocation(environment: Mapping[str, str], command: str) -> None:
    """Raise ConfigError in the batch script or shell of a Slurm allocation of several nodes: a run started here would
    leave the other nodes idle. `command`: the user's command line."""
    nodes = _number(environment, "SLURM_JOB_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    inside = "SLURM_JOB_ID" in environment and not _in_step(environment)
    if inside and nodes > 1 and find_task(environment) is None:
        got = f"an allocation of {nodes} nodes, but no srun in front of the command"
        raise problem("Slurm", got, "one task for each process of the run", f"srun {command}")


def _by_torch(environment: Mapping[str, str]) -> Task | None:
    """torchrun's variables, which may also be set by hand."""
    meeting = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment]
    if len(meeting) < 2 and environment.get("RANK", "0") == "0" and environment.get("WORLD_SIZE", "1") == "1":
        return None  # leftovers in a shell, harmless for a single process
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in environment]
    if missing:
        present = [name for name in wanted if name in environment]
        got = " ".join(f"{name}={environment[name]}" for name in present) + f" without {' and '.join(missing)}"
        fix = f"unset {' '.join(present)}, or start it with torchrun or srun"
        raise problem("environment", got, "all four, or none", fix)
    rank, world = _place(environment, "RANK", "WORLD_SIZE")
    _same_as_launcher(environment, rank, world)
    locals_ = ("LOCAL_RANK", *(("SLURM_LOCALID",) if _in_step(environment) else ()), "OMPI_COMM_WORLD_LOCAL_RANK")
    known = next((name for name in locals_ if name in environment), None)
    if known is None and world > 1:
        fix = "export LOCAL_RANK=<number of this process on its machine>, or use torchrun"
        raise problem("environment", "RANK and WORLD_SIZE without LOCAL_RANK", "LOCAL_RANK, to choose a GPU", fix)
    return Task(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE",
        rank=rank,
        world=world,
        local_rank=_number(environment, known) if known else 0,
        address=environment["MASTER_ADDR"],
        port=_port(environment),
    )


def _same_as_launcher(environment: Mapping[str, str], rank: int, world: int) -> None:
    """Refuse RANK and WORLD_SIZE that were left over in the shell that called srun or mpirun: all tasks would be the
    same rank. With torchrun in each task there are more ranks than tasks, which is fine."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return
    for task in (_ranks(environment, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), _slurm_place(environment)):
        if task is not None and task[1] > 1 and (world < task[1] or (world == task[1] and rank != task[0])):
            got = f"RANK={rank} and WORLD_SIZE={world} in task {task[0]} of {task[1]}"
            fix = "unset RANK WORLD_SIZE in front of srun or mpirun"
            raise problem("environment", got, "the task's own numbers, or none", fix)


def _by_open_mpi(environment: Mapping[str, str]) -> Task | None:
    place = _ranks(environment, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if place is None:
        return None
    local, size = (_number(environment, f"OMPI_COMM_WORLD_LOCAL_{what}", -1) for what in ("RANK", "SIZE"))
    job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
    return _by_mpi(environment, place, local, place[1] == size, job)


def _by_pmi(environment: Mapping[str, str]) -> Task | None:
    """MPICH and its derivatives. srun --mpi=pmi2 sets the same variables, but Slurm's own say more."""
    place = _ranks(environment, "PMI_RANK", "PMI_SIZE")
    if place is None or place == _slurm_place(environment):
        return None
    names = ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK")
    local = next((_number(environment, name) for name in names if name in environment), -1)
    here = _number(environment, "MPI_LOCALNRANKS", -1) == place[1]
    return _by_mpi(environment, place, local, here, environment.get("PMI_JOBID", ""))


def _by_mpi(environment: Mapping[str, str], place: tuple[int, int], local: int, here: bool, job: str) -> Task:
    """`here`: all ranks are on one machine. mpirun does not say on which host rank 0 is."""
    rank, world = place
    if world > 1 and "MASTER_ADDR" not in environment and not here:
        expected = "MASTER_ADDR, the host of rank 0"
        fix = "mpirun -x MASTER_ADDR=<host of rank 0> ... (Open MPI), or torchrun or srun"
        raise problem("mpirun", f"{world} ranks, perhaps on several machines", expected, fix)
    if world > 1 and local < 0:
        fix = "mpirun of Open MPI or MPICH, or torchrun or srun"
        raise problem("mpirun", "no local rank", "the rank within the machine, to choose a GPU", fix)
    return Task(
        launcher="mpirun",
        rank=rank,
        world=world,
        local_rank=max(0, local),
        address=environment.get("MASTER_ADDR", _HERE),
        port=_port(environment, zlib.crc32(job.encode())),
    )


def _by_slurm(environment: Mapping[str, str]) -> Task | None:
    place = _slurm_place(environment)
    if place is None:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    if place[1] > 1 and not nodes and "MASTER_ADDR" not in environment:
        expected = "SLURM_STEP_NODELIST, whose first node hosts rank 0"
        raise problem("srun", "no list of nodes", expected, "export MASTER_ADDR=<host of rank 0> in front of srun")
    return Task(
        launcher="srun",
        rank=place[0],
        world=place[1],
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        address=environment.get("MASTER_ADDR", first_node(nodes)),
        # Every task derives the same port from the job and step numbers.
        port=_port(environment, _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID")),
    )


def _by_pmix(environment: Mapping[str, str]) -> Task | None:
    """A PMIx launcher other than srun and Open MPI, which is refused: it does not say how many ranks there are."""
    if "PMIX_RANK" not in environment or _in_step(environment):
        return None
    got = f"PMIX_RANK={environment['PMIX_RANK']} and no number of processes"
    expected = "the variables of Open MPI's mpirun, of srun or of torchrun"
    raise problem("environment", got, expected, "start it with one of them, or unset PMIX_RANK")


def _by_submitit_local(environment: Mapping[str, str]) -> Task | None:
    """A task that submitit started on this machine, without Slurm."""
    place = _ranks(environment, "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS")
    if place is None:
        return None
    return Task(
        launcher="submitit",
        rank=place[0],
        world=place[1],
        local_rank=_number(environment, "SUBMITIT_LOCAL_LOCALID", place[0]),
        address=_HERE,
        port=_port(environment, zlib.crc32(environment.get("SUBMITIT_LOCAL_JOB_ID", "").encode())),
    )


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: the batch script also has SLURM_PROCID and SLURM_NTASKS, but no step."""
    return _number(environment, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP) < _FIRST_SPECIAL_STEP


def _slurm_place(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and number of tasks in a Slurm step; None outside one."""
    if not _in_step(environment) or "SLURM_PROCID" not in environment:
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _place(environment, "SLURM_PROCID", count) if count in environment else None


def _ranks(environment: Mapping[str, str], rank: str, world: str) -> tuple[int, int] | None:
    return _place(environment, rank, world) if rank in environment and world in environment else None


def _place(environment: Mapping[str, str], rank: str, world: str) -> tuple[int, int]:
    number, count = _number(environment, rank), _number(environment, world)
    if not 0 <= number < count:
        fix = f"unset {rank} {world}, or start it with torchrun or srun"
        raise problem(rank, number, f"0 to {count - 1}, below {world}={count}", fix)
    return number, count


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not re.fullmatch(r"\d+", value.strip()):
        raise problem(f"environment variable {name}", repr(value), "a number", f"unset {name}")
    return int(value)


def _port(environment: Mapping[str, str], otherwise: int = 0) -> int:
    """MASTER_PORT, or a port derived from a number that all tasks share."""
    port = _number(environment, "MASTER_PORT", 20000 + otherwise % 20000)
    if not 0 < port < 2**16:
        raise problem("environment variable MASTER_PORT", port, "1 to 65535", "export MASTER_PORT=29500")
    return port


def first_node(nodes: str) -> str:
    """The first node of a Slurm node list: gpu003 for gpu[003-005,9],cpu1."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
