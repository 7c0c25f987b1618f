"""LoRA on a language model that has never seen an image: does NVLM-X or -H learn to read the pages?

    python benchmarks/lora.py [--arch xattn] [--text-steps 700] [--steps 900] [--out lora]

1. A tiny language model learns the pages' questions from text alone: the prompt contains the digits after their tags.
2. Its weights are exported and reduced to the folder of a published language model.
3. `peft=lora init.llm=FOLDER`: adapters on the language model; projector and cross-attention are trained in full.

The last lines are the held-out exact match of `launch/train.py`. It takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from nvlm.data.sources.page_questions import KINDS, SHARES, ask
from nvlm.data.sources.pages import GRIDS

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "language_model."


def conversation(rng: np.random.Generator) -> list[dict[str, str]]:
    """Four questions about a page whose digits are given as text."""
    cols, rows = GRIDS[rng.integers(len(GRIDS))]
    digits = rng.choice(rng.permutation(10)[: rng.integers(2, 11)], (rows, cols))
    weights = np.array(list(SHARES["tags"].values())) * (digits.size > 1, 1, 1, 1)
    turns: dict[str, str] = {}
    while len(turns) < 4:
        question, answer = ask(str(rng.choice(KINDS, p=weights / weights.sum())), digits, rng)
        turns.setdefault(question, answer)
    tags = [f"<tile_{number}>{digit}" for number, digit in enumerate(digits.flat, start=1)]
    page = "\n".join("".join(tags[start : start + cols]) for start in range(0, digits.size, cols))
    messages = [
        {"role": role, "content": content}
        for turn in turns.items()
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    messages[0]["content"] = f"{page}\n{messages[0]['content']}"
    return messages


def language_model(exported: Path, out: Path) -> None:
    """The language model's folder inside an exported NVLM-D."""
    out.mkdir()
    tensors = load_file(exported / "model-00001-of-00001.safetensors")
    kept = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    save_file(kept, out / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())["llm_config"]
    (out / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))


def main() -> None:
    """The three steps, in a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("xattn", "hybrid"), default="xattn")
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--records", type=int, default=6000, help="text records")
    parser.add_argument("--out", type=Path, default=Path("lora"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rng = np.random.default_rng(5)
    rows = (json.dumps({"messages": conversation(rng)}) for _ in range(args.records))
    (args.out / "text.jsonl").write_text("\n".join(rows) + "\n")

    def run(script: str, *words: str) -> None:
        subprocess.run([sys.executable, str(ROOT / "launch" / script), *words], cwd=args.out, check=True)

    run("train.py", "name=text", "arch=decoder", "data=jsonl", "data.path=text.jsonl", "evaluate=none",
        f"train.steps={args.text_steps}")  # fmt: skip
    run("export_hf.py", "checkpoint=runs/text", "out=exported")
    language_model(args.out / "exported", args.out / "text-only")
    run("train.py", "name=lora", f"arch={args.arch}", "peft=lora", "init.llm=text-only", f"train.steps={args.steps}")


if __name__ == "__main__":
    main()
