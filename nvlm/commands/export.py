"""The command: key=value options, one line where something is wrong. Imports no torch before they are checked."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.commands.launch import quiet
from nvlm.commands.mistakes import answered_or_helped
from nvlm.export.options import parse

HELP = """python launch/export_hf.py checkpoint=RUN out=DIR [key=value ...]

checkpoint=RUN   a run folder (its newest checkpoint), or one of its checkpoints/step_N
out=DIR          the folder to be written: safetensors, config.json, tokenizer, modeling_nvlm.py, README.md
vision=DIR       where the encoder is, if no longer where the run read it; tokenizer=DIR likewise
like=DIR         store each tensor as wide as this folder does (NVLM-D-72B holds some in fp32), not as the run held it
shard_gb=5       the largest file, GB"""


def main(arguments: Sequence[str]) -> int:
    """Answer the command line; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    quiet()
    options = parse(arguments)
    from nvlm.export.export import export

    notes: list[str] = []
    print(f"wrote {export(options, notes.append)}")
    for line in notes:
        print(f"note: {line}")
    return 0
