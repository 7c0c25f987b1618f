"""Records made by hand, whose counts are known, and an inspection of them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from nvlm.commands import inspect
from nvlm.config.values import Config
from nvlm.inspect.page import Found

PX = 112  # of a tile of vision=tiny, which has 16 tokens
HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted\" 'single'"


def written(folder: Path) -> Path:
    """A JSONL file: three usable records, with two, one and no images, and three bad ones."""
    Image.new("RGB", (3 * PX, 2 * PX), "red").save(folder / "wide.png")
    Image.new("RGB", (PX, PX), "blue").save(folder / "square.png")
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:60])
    rows = [
        (["wide.png", "square.png"], "<image>first<image>second", "ab", {}),
        (["square.png"], HOSTILE, HOSTILE, {"id": HOSTILE}),
        ([], "no picture", "é 中文 \N{SLIGHTLY SMILING FACE}\n\nend", {}),
        (["nowhere.png"], "?", "!", {}),
        ([], "too long " * 400, "!", {}),
        (["wide.png"] * 40, "too many", "!", {}),
    ]
    lines = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": images,
            **more,
        }
        for images, question, answer, more in rows
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(folder: Path, arch: str = "decoder", *more: str) -> list[str]:
    """The command line for the records in `folder`."""
    path = f"data.path={folder / 'records.jsonl'}"
    own = ("data=jsonl", path, "data.system=null", "data.workers=0", "evaluate=none", "train.global_batch=8")
    return [f"arch={arch}", *own, "data.cross_length=256" if arch != "decoder" else "data.cross_length=0", *more]


def found(config: Config, out: Path, **options) -> Found:
    """What an inspection of `config` finds."""
    values = {"records": None, "pixels": False, "show": 12, "max_bad": 0.01} | options
    return inspect.inspect(config, inspect.Request(out=out, **values))
