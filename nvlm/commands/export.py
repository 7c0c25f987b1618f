"""The export command, with key=value options. Imports no torch before they are checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from nvlm.commands.launch import quiet
from nvlm.commands.mistakes import answered_or_helped
from nvlm.export.options import ExportOptions, parse

_SMALL = 4e9  # bytes of weights that are compared unasked

HELP = """python launch/export_hf.py checkpoint=RUN out=DIR [key=value ...]

checkpoint=RUN   a run folder (its newest checkpoint), or one of its checkpoints/step_N
out=DIR          the folder to write: safetensors, config.json, tokenizer and so on
layout=nvlm      as NVLM-D-72B, with modeling_nvlm.py; llava-hf: for transformers and vLLM; llava, vila: for their code
parity=true      layout=llava-hf: compare logits with transformers' class (by default if the weights are under 4 GB)
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
    out = export(options, notes.append)
    print(f"wrote {out}")
    for line in [*notes, *_parity(options, out)]:
        print(f"note: {line}")
    return 0


def _parity(options: ExportOptions, out: Path) -> list[str]:
    """A line about the logits of transformers' class, if the folder is in its layout and it is installed."""
    if options.layout != "llava-hf" or options.parity is False:
        return []
    if find_spec("transformers") is None:
        return ["transformers is not installed: its logits were not compared"]
    if options.parity is None and (size := sum(file.stat().st_size for file in out.rglob("*.safetensors"))) > _SMALL:
        return [f"{size / 1e9:.0f} GB of weights: parity=true compares transformers' logits, with two models in fp32"]
    from nvlm.generate.parity import parity

    with redirect_stdout(sys.stderr):
        named = {"init.vision": options.vision, "llm.tokenizer": options.tokenizer}
        found = parity(options.checkpoint, out, [f"{key}={value}" for key, value in named.items() if value])
    same = "the same token ids" if found.same_ids else "OTHER token ids from its processor"
    return [
        f"logits of transformers' class: largest difference {found.largest:.1e} in log-probabilities after "
        f"{found.tokens} tokens, a picture's among them; {same}"
    ]
