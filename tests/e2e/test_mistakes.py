"""Users' mistakes end in one line, never in a traceback: real shells, real commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.commands.mistakes import answered
from nvlm.config.values import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def shell(line: str, where: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `line` with bash in `where`; `train`, `generate`, `export_hf` and `plan` are the commands."""
    names = "\n".join(
        f'{name}() {{ {sys.executable} {ROOT}/launch/{name}.py "$@"; }}'
        for name in ("train", "generate", "export_hf", "plan")
    )
    given = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(where)} | environment
    command = ["bash", "-c", f"{names}\n{line}"]
    return subprocess.run(command, cwd=where, env=given, capture_output=True, text=True, timeout=120)


LINES = {
    "touch runs; train": "runs, a file, expected a folder that can be written",
    "mkdir runs; ln -s /nowhere runs/x; train name=x": "a link to /nowhere, which does not exist",
    "mkdir runs; touch runs/x; train name=x": "x, a file, expected",
    "train hydra.run.dir=/proc/x": "/proc/x: No such file or directory",
    "touch x; train -m seed=1,2 hydra.sweep.dir=x": "x, a file, expected",
    "train name=../x": "name: got '../x'",
    "train data.workers=-1": "data.workers: got -1, expected at least 0",
    "train vision.tile_size=0": "vision.tile_size: got 0",
    "train seed=1,2": "-m for a sweep",
    "train --cfg job arch=foo": "arch: got 'foo'",
    "mkdir gone; cd gone; rmdir ../gone; train": "working directory: got one that was deleted",
    "generate checkpoint=runs/none prompt=hi": "/runs/none', expected a run folder",
    "export_hf checkpoint=runs/none out=x": "checkpoint: got 'runs/none' in ",
    "train init.checkpoint=runs/none": "init.checkpoint: got 'runs/none' in ",
    "train init.llm=llm": "init.llm: got 'llm' in ",
    "plan gpus=8 gpu=h100 json=/nowhere/x.json": "/nowhere/x.json",
    "plan gpus=8 gpu=h100 data.workers=-1": "data.workers: got -1",
    "export_hf checkpoint=": "got",
    "generate checkpoint=x prompt=x >&- <&-": "/x', expected a run folder",
    "train --help > /dev/full": "No space left on device",
}


@pytest.mark.parametrize("line", LINES)
def test_one_line_says_what_is_wrong(line, tmp_path):
    done = shell(line, tmp_path)
    assert done.returncode in (1, 2), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and LINES[line] in done.stderr


@pytest.mark.parametrize("command", ["train --help", "train --cfg job", "plan gpus=8 gpu=h100", "generate --help"])
def test_a_reader_that_has_read_enough_ends_it_in_silence(command, tmp_path):
    done = shell(f"({command}; echo $? >&2) | head -n 1", tmp_path)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.strip() in ("0", "1")


def test_what_is_printed_to_closed_streams_is_in_no_file(tmp_path):
    """The next file to be opened gets the number of a closed stream."""
    code = (
        "import os, sys; from nvlm.commands.mistakes import answered\n"
        "def command():\n"
        "    with open('file', 'w') as file:\n"
        "        print('to nobody'); os.system('echo to nobody'); sys.stderr.write('nor this')\n"
        "        assert file.fileno() > 2 and sys.stdin.readline() == ''\n"
        "    return 7\n"
        "sys.exit(answered(command))"
    )
    done = shell(f'PYTHONPATH={ROOT} {sys.executable} -c "$CODE" <&- >&- 2>&-', tmp_path, CODE=code)
    assert done.returncode == 7
    assert (tmp_path / "file").read_text() == ""


def test_each_kind_of_end_has_its_status(capsys):
    def fail(error: BaseException):
        raise error

    assert answered(lambda: 0) == 0
    assert answered(lambda: fail(ConfigError("no"))) == 2
    assert answered(lambda: fail(FileNotFoundError(2, "No such file", "x"))) == 1
    assert answered(lambda: fail(KeyboardInterrupt())) == 130
    assert answered(lambda: fail(BrokenPipeError())) == 1
    assert capsys.readouterr().err == "error: no\nerror: x: No such file\n"
    with pytest.raises(ZeroDivisionError):  # a fault of the program's is not hidden
        answered(lambda: fail(ZeroDivisionError()))
