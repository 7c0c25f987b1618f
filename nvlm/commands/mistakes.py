"""What a user can cause, whichever command it is: one line that says what is wrong, an exit status, and no traceback.

Imports no torch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from nvlm.config.values import ConfigError, problem
from nvlm.processes.workers import report
from nvlm.train.guard import BrokenRun

REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses
# What the system says of its own state, naming no file: no room, a broken disk, too many open files.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)


def answered(command: Callable[[], int], failed: int = FAILED) -> int:
    """The exit status of `command`, whose standard streams may be closed or broken.

    `failed`: the status of one that ends with a message although its configuration is right. Faults of the program
    itself are raised as they are.
    """
    _open_streams()
    try:
        _check_working_folder()
        status = _status(command)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        report(f"error: {error}")
        return REFUSED
    except BrokenRun as error:  # raised on all ranks alike, under torchrun or srun
        report(f"error: {error}")
        return failed
    except BrokenPipeError:  # whoever read the output, as in `| head`, has read enough
        return failed
    except OSError as error:
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        what = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        report(f"error: {what}{error.strerror or error}")
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        _drop_what_cannot_be_written()


def answered_or_helped(arguments: Sequence[str], help_text: str, command: Callable[[Sequence[str]], int]) -> int:
    """As `answered` of `command(arguments)`; prints `help_text` instead where -h or --help is among the arguments."""

    def answer() -> int:
        if {"-h", "--help"}.isdisjoint(arguments):
            return command(arguments)
        print(help_text)
        return 0

    return answered(answer)


def _status(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as end:  # Hydra's, behind --help
        if isinstance(end.code, str):
            raise
        return end.code or 0


def _open_streams() -> None:
    """Let /dev/null stand in for standard streams that are closed: the next file to be opened would take their place,
    and what is printed would end up in it. What the terminal's encoding lacks is printed as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, closefd=False))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise problem("working directory", "one that was deleted", "one that exists", "cd to one") from None


def _drop_what_cannot_be_written() -> None:
    """What is left in a broken stdout would end the interpreter with a complaint."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
