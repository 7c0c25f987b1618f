"""launch/slurm/nvlm.sbatch with a fake Slurm of one machine: `srun` starts local tasks and kills them when it gets a
SIGTERM; `scancel` signals them; `scontrol requeue` is recorded.

The script, its signals and its requeues are real; in the slow test the trainer is, too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nvlm.config.rules import check_world

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "nvlm.sbatch"
SMALL = (
    "precision=fp32 data.records=48 data.workers=0 train.global_batch=4 llm.layers=2 llm.cross_every=2 train.threads=1 "
    "optim.warmup=2 evaluate.questions=0 train.steps=12 train.save_every=100"
).split()
SRUN = """
    import os, signal, subprocess, sys
    arguments = sys.argv[1:]
    while arguments[0].startswith("--"):
        print("srun option", arguments.pop(0))
    tasks = []
    def end(number, frame):  # as Slurm's: no task gets to save
        for task in tasks:
            task.kill()
    signal.signal(signal.SIGTERM, end)
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        ranks = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0"}
        tasks.append(subprocess.Popen(arguments, env=os.environ | ranks))
    with open("tasks", "w") as file:
        file.write(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
    import os, sys
    if sys.argv[1:3] == ["show", "hostnames"]:
        print("127.0.0.1\\nnode2")
    else:
        assert sys.argv[1] == "requeue" and sys.argv[2] == os.environ["SLURM_JOB_ID"]
        open("requeued", "a").write("x")
"""
SCANCEL = """
    import os, signal, sys
    assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for task in map(int, open("tasks").read().split()):
        os.kill(task, signal.SIGTERM)
"""
# As much of the trainer as the script looks at: a step each tenth of a second, saved at the end or at a signal.
TRAINER = """
    import os, pathlib, signal, sys, time
    overrides = dict(word.lstrip("+").split("=", 1) for word in sys.argv[2:])
    if overrides.get("fail"):
        sys.exit(int(overrides["fail"]))
    came, steps = [], int(overrides["steps"])
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    run = pathlib.Path("runs", overrides["name"])
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"llm:\\n  steps: 7\\ntrain:\\n  keep: 1\\n  steps: {steps}\\n")
    latest = run / "checkpoints" / "latest"
    step = int(latest.read_text()[5:]) if latest.exists() else 0
    (run / "seen").write_text(str(os.environ["SLURM_PROCID"]) + " " + " ".join(sys.argv[1:]))
    while step < steps and not came:
        time.sleep(0.1)
        step += overrides.get("stuck") is None
    latest.write_text(f"step_{step:08d}\\n")
"""


class Cluster:
    """The folder that sbatch is called in, and the job that runs there."""

    def __init__(self, where: Path, tasks: int) -> None:
        self.where, self.bin, self.tasks = where, where / "bin", tasks
        self.bin.mkdir()
        for name, code in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            self.command(name, code)

    def command(self, name: str, code: str) -> Path:
        """A Python program on PATH."""
        path = self.bin / name
        path.write_text(f"#!{sys.executable} -S\n{textwrap.dedent(code)}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def start(self, *overrides: str, restarts: int = 0, **environment: str) -> subprocess.Popen:
        """Does what Slurm does with the script on the first node."""
        told = {
            "SLURM_SUBMIT_DIR": str(self.where),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_RESTART_COUNT": str(restarts),
            "NAME": "job",
            "NVLM_HOME": str(ROOT),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }
        command = ["bash", str(SCRIPT), *overrides]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD"))}
        return subprocess.Popen(command, env=clean | told | environment, cwd=self.where, **pipes)

    def run(self, *overrides: str, restarts: int = 0, **environment: str) -> tuple[int, str]:
        """Exit status and log of a whole job."""
        return end(self.start(*overrides, restarts=restarts, **environment))

    @property
    def requeues(self) -> int:
        """How often the job asked to be requeued."""
        path = self.where / "requeued"
        return len(path.read_text()) if path.exists() else 0

    @property
    def latest(self) -> str:
        """The newest checkpoint."""
        return (self.where / "runs" / "job" / "checkpoints" / "latest").read_text().strip()


def end(job: subprocess.Popen) -> tuple[int, str]:
    """Exit status and log."""
    output, _ = job.communicate(timeout=240)
    return job.returncode, output


def wait_for(path: Path, job: subprocess.Popen, seconds: float = 180) -> None:
    """Return once `path` exists and is not empty."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    """Two tasks."""
    return Cluster(tmp_path, 2)


@pytest.fixture
def toy(cluster) -> tuple[Cluster, dict[str, str]]:
    """A cluster with the toy trainer."""
    return cluster, {"PYTHON": str(cluster.command("toy", TRAINER)), "EXPERIMENT": ""}


def test_a_job_that_finishes_is_not_requeued(toy):
    cluster, environment = toy
    status, output = cluster.run("steps=3", "a=b c", **environment)
    assert status == 0 and "runs/job: finished" in output and cluster.requeues == 0
    told = (cluster.where / "runs" / "job" / "seen").read_text()
    assert told.endswith(f"{ROOT}/launch/train.py resume=auto name=job steps=3 a=b c")


def test_the_experiment_and_the_container_are_passed_on(toy):
    cluster, environment = toy
    environment |= {"CONTAINER_IMAGE": "registry#team/nvlm:1", "CONTAINER_MOUNTS": "/data:/data"}
    del environment["EXPERIMENT"]
    status, output = cluster.run("steps=1", **environment)
    assert status == 0, output
    assert "+experiment=nvlm_h_72b_sft resume=auto" in (cluster.where / "runs" / "job" / "seen").read_text()
    assert "srun option --container-image=registry#team/nvlm:1\n" in output
    where = cluster.where
    assert f"--container-mounts={where}:{where},{ROOT}:{ROOT},/data:/data\n" in output
    assert f"--container-workdir={where}\n" in output


@pytest.mark.parametrize("told", ["the script", "the tasks alone"])
def test_a_signal_saves_and_requeues_and_the_next_job_finishes(toy, told):
    """Slurm signals the script before the time limit (--signal=B:), and the tasks on preemption."""
    cluster, environment = toy
    job = cluster.start("steps=30", **environment)
    wait_for(cluster.where / "runs" / "job" / "seen", job)
    time.sleep(0.5)
    pids = [job.pid] if told == "the script" else map(int, (cluster.where / "tasks").read_text().split())
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    status, output = end(job)
    assert status == 0 and f"runs/job: {cluster.latest}, requeued" in output
    assert cluster.requeues == 1 and cluster.latest != f"step_{30:08d}"
    status, output = cluster.run("steps=30", restarts=1, **environment)
    assert status == 0 and "finished" in output
    assert cluster.requeues == 1 and cluster.latest == f"step_{30:08d}"


def test_a_failure_is_passed_on_and_not_requeued(toy):
    cluster, environment = toy
    status, output = cluster.run("fail=2", "steps=3", **environment)
    assert status == 2 and "failed with exit status 2, not requeued" in output and cluster.requeues == 0


def test_a_job_that_gets_nowhere_ends(toy):
    cluster, environment = toy
    for restarts, requeues in ((0, 1), (1, 1)):
        job = cluster.start("steps=30", "stuck=1", restarts=restarts, **environment)
        wait_for(cluster.where / "runs" / "job" / "seen", job)
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        status, output = end(job)
        assert cluster.requeues == requeues
        (cluster.where / "runs" / "job" / "seen").unlink()
    assert status == 1 and "no progress beyond" in output


def test_what_is_not_given_is_said():
    done = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode and "runs under sbatch" in done.stderr


def test_slurm_s_options_fit_the_trainer():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    stop_seconds = float(re.search(r"stop_seconds: (\d+)", (ROOT / "conf/train/paper.yaml").read_text())[1])
    assert float(options["signal"].partition("@")[2]) > stop_seconds
    assert options["signal"].startswith("B:TERM@")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_and_requeued_it_trains_as_if_nothing_had_been(tmp_path):
    def losses(cluster: Cluster) -> list[float]:
        rows = (cluster.where / "runs" / "job" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    real = {"PYTHON": sys.executable, "EXPERIMENT": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = (Cluster(tmp_path / name, 2) for name in ("whole", "broken"))
    status, output = whole.run(*SMALL, **real)
    assert status == 0 and "runs/job: finished" in output, output
    job = broken.start(*SMALL, **real)
    wait_for(broken.where / "runs" / "job" / "metrics.jsonl", job)
    job.send_signal(signal.SIGTERM)
    status, output = end(job)
    assert status == 0 and "stopped by SIGTERM after step" in output, output
    done = len(losses(broken))
    assert 1 <= done < 12 and broken.latest == f"step_{done:08d}" and broken.requeues == 1
    status, output = broken.run(*SMALL, restarts=1, **real)
    assert status == 0 and "runs/job: finished" in output, output
    assert losses(broken) == losses(whole) and len(losses(whole)) == 12
    assert broken.requeues == 1


@pytest.mark.parametrize("nodes", [8, 16, 32, 64])
def test_the_recipe_of_the_script_fits_its_nodes(configured, nodes):
    overrides = "+experiment=nvlm_h_72b_sft resume=auto name=job init.checkpoint=RUN init.vision=DIR"
    check_world(configured(*overrides.split(), "data=jsonl", "data.path=FILE.jsonl"), 8 * nodes)
