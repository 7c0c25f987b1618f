"""The launcher with workers of a few lines: what it prints, how it ends, and that no process outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.alive import alive

ROOT = Path(__file__).resolve().parents[3]
# Starts two workers of the code in argv[1] and exits as they do; SIGTERM gives them argv[2] seconds.
LAUNCHER = """
import os, sys
from nvlm.processes.workers import run_workers
sys.exit(run_workers([sys.executable, "-c", sys.argv[1]], 2, os.environ, float(sys.argv[2]))[0])
"""
PREFIX = "import os, signal, sys, time\nfrom pathlib import Path\nrank = os.environ['RANK']\n"


def launcher(where: Path, worker: str, stop_seconds: float = 30) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PREFIX + worker, str(stop_seconds)],
        cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def ends(process: subprocess.Popen, where: Path) -> tuple[int, str]:
    """Exit status and output on stderr; all processes must be gone."""
    said = process.communicate(timeout=60)[1]
    wait_for(lambda: not alive(where), 5)
    return process.returncode, said


def test_success_says_nothing(tmp_path):
    worker = "assert os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == rank and os.environ['MASTER_PORT']"
    assert ends(launcher(tmp_path, worker), tmp_path) == (0, "")


def test_a_killed_rank_is_named_and_the_stubborn_other_one_ended(tmp_path):
    stubborn = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath('ready' + rank).touch()\n"
        "while not Path('ready0').exists(): time.sleep(0.01)\n"
        "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    )
    began = time.monotonic()
    assert ends(launcher(tmp_path, stubborn), tmp_path) == (1, "rank 1 of 2 was killed by SIGKILL\n")
    assert time.monotonic() - began < 20


def test_a_failed_rank_is_named(tmp_path):
    worker = "sys.exit(7) if rank == '0' else time.sleep(600)"
    assert ends(launcher(tmp_path, worker), tmp_path) == (1, "rank 0 of 2 ended with exit status 7\n")


def test_a_refused_configuration_is_said_once_and_by_whoever_finds_it(tmp_path):
    same = "from nvlm.processes.workers import report\nreport('error: no')\nsys.exit(2)"
    assert ends(launcher(tmp_path, same), tmp_path) == (2, "error: no\n")
    one = "from nvlm.processes.workers import report\nif rank == '1': report('error: no'); sys.exit(2)\ntime.sleep(600)"
    assert ends(launcher(tmp_path, one), tmp_path) == (2, "error: no\n")


OBEDIENT = """
def stop(number, frame):
    Path('got' + rank).write_text(str(number))
    time.sleep(1)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
Path('ready' + rank).touch()
time.sleep(600)
"""


def both_ready(where: Path) -> bool:
    return (where / "ready0").exists() and (where / "ready1").exists()


def test_a_signal_is_handed_on_and_waited_for(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        process = launcher(tmp_path, OBEDIENT)
        wait_for(lambda: both_ready(tmp_path))
        process.send_signal(number)
        assert ends(process, tmp_path) == (0, "")
        assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
        for path in tmp_path.iterdir():
            path.unlink()


def test_who_does_not_stop_in_time_is_killed(tmp_path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath('ready' + rank).touch()\ntime.sleep(600)"
    process = launcher(tmp_path, deaf, stop_seconds=0.5)
    wait_for(lambda: both_ready(tmp_path))
    process.terminate()
    assert ends(process, tmp_path) == (1, "workers still running 0.5 s after SIGTERM: killed\n")


FORKING = """
from nvlm.processes.workers import take_forks_along
take_forks_along()
if os.fork() == 0:
    if os.fork() == 0: Path('ready' + rank).touch()
    time.sleep(600)
time.sleep(600)
"""


def test_a_killed_launcher_takes_its_workers_and_their_forks_along(tmp_path):
    process = launcher(tmp_path, FORKING)
    wait_for(lambda: both_ready(tmp_path))
    assert len(alive(tmp_path)) == 7  # a launcher, and twice a worker, its child and its grandchild
    process.kill()
    assert ends(process, tmp_path) == (-signal.SIGKILL, "")


def test_a_killed_worker_leaves_no_fork(tmp_path):
    process = launcher(tmp_path, FORKING + "\n", stop_seconds=1)
    wait_for(lambda: both_ready(tmp_path))
    worker = next(pid for pid in alive(tmp_path) if pid != str(process.pid) and parent(pid) == process.pid)
    os.kill(int(worker), signal.SIGKILL)
    status, said = ends(process, tmp_path)
    assert status == 1
    assert "was killed by SIGKILL" in said


def parent(pid: str) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_the_port_of_the_rendezvous_is_taken_before_the_workers_begin(tmp_path):
    worker = """
import os, socket
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
try:
    socket.create_server(address)
    raise SystemExit("somebody else could take it")
except OSError:
    pass
if os.environ["RANK"] == "0":
    held = socket.socket(fileno=int(os.environ["NVLM_LISTENER"]))  # closed when it is collected
    assert held.getsockname() == address
    while not Path("looked").exists():  # the port is taken for as long as this rank lives
        time.sleep(0.01)
else:
    assert "NVLM_LISTENER" not in os.environ
    Path("looked").touch()
"""
    assert ends(launcher(tmp_path, worker), tmp_path) == (0, "")
