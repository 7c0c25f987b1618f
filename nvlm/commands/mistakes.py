"""Turns users' mistakes in any command into one line and an exit status instead of a traceback.

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
# Errors about the machine's state without a file name: full disk, broken disk, too many open files.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)


def answered(command: Callable[[], int], failed: int = FAILED) -> int:
    """The exit status of `command`, whose standard streams may be closed or broken.

    `failed`: the status of a command that ends with a message although its configuration is valid. Bugs of the program
    itself keep their traceback.
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
    except BrokenRun as error:  # all ranks raise it, under torchrun or srun
        report(f"error: {error}")
        return failed
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
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
    """`answered` for `command(arguments)`; with -h or --help among the arguments, prints `help_text` instead."""

    def answer() -> int:
        if {"-h", "--help"}.isdisjoint(arguments):
            return command(arguments)
        print(help_text)
        return 0

    return answered(answer)


def _status(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as end:  # Hydra's, after --help
        if isinstance(end.code, str):
            raise
        return end.code or 0


def _open_streams() -> None:
    """Replace closed standard streams by /dev/null: otherwise the next file to be opened would get their number and
    whatever is printed. Characters that the terminal's encoding lacks are printed as escapes."""
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
    """Discard what is left in a broken stdout, about which the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
