"""The export command, with key=value options. Imports no torch before they are checked."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm.commands.launch import quiet
from nvlm.commands.mistakes import answered_or_helped
from nvlm.export.options import parse

HELP = """python launch/export_hf.py checkpoint=RUN out=DIR [key=value ...]

checkpoint=RUN   a run folder (its newest checkpoint), or one of its checkpoints/step_N
out=DIR          the folder to write: safetensors, config.json, tokenizer and so on
layout=nvlm      as NVLM-D-72B, with modeling_nvlm.py; llava-hf: for transformers and vLLM; llava, vila: for their code
vision=DIR       where the encoder is, if no longer where the run read it; tokenizer=DIR likewise
like=DIR         store each tensor in the precision that it has in this folder (NVLM-D-72B has some in fp32)
shard_gb=5       maximum size of a file, GB"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
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
