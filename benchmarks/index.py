"""Cost of starting, planning and resuming a run over a prepared index of many records, of which no image exists.

    python benchmarks/index.py [--records 10000000] [--folder /tmp/nvlm-index] [--windows 5]

Builds the index once, in the folder: records of log-normal text with 0 to 3 images, and a sparse JSON file of the size
that they would have. Each row of the table is a process of its own: imports; start, that is, checking and opening index
and records, and planning the first window; resuming, that is, the same for a step near the end of ten epochs. Times are
CPU seconds, so that other processes on the machine do not count. Resident memory is what the process has beyond its
imports, after planning --windows windows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("decoder", "xattn", "hybrid")
BATCHES = (256, 1024)  # records per step
BYTES = 400  # of a line of JSON
CHUNK = 1 << 20  # records written at a time
SIZES = ((640, 480), (1024, 768), (1654, 2339), (336, 336), (1200, 400), (3000, 2000))  # px


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10**7)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nvlm-index"))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # architecture, records per step
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given, given.measure[0], int(given.measure[1]))))
        return
    build(given.records, given.folder)
    print(f"{given.records:,} records; a window is 8 steps; CPU times of one process\n")
    print("| arch | records a step | imports, s | start, s | resume, s | us a record | imports, MB | beyond them, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in ARCHITECTURES:
        for batch in BATCHES:
            words = [f"--{key}={getattr(given, key)}" for key in ("records", "folder", "windows")]
            command = [sys.executable, __file__, *words, "--measure", arch, str(batch)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            print(f"| {arch} | {batch} | " + " | ".join(str(value) for value in found.values()) + " |", flush=True)


def configured(folder: Path, arch: str, batch: int):
    """A run over the index in `folder`."""
    from nvlm.commands.compose import compose_config

    return compose_config(
        f"arch={arch}", "llm=qwen2-7b", "llm.tokenizer=tiny", "data=jsonl", f"data.path={folder / 'records.jsonl'}",
        f"data.index={folder / 'index'}", "train.steps=1000000", f"train.global_batch={batch}",
    )  # fmt: skip


def measured(given: argparse.Namespace, arch: str, batch: int) -> dict[str, float]:
    """One row of the table, measured in this process."""
    began = time.process_time()
    from nvlm.arch.registry import placement_rule
    from nvlm.data.blend import build_order
    from nvlm.data.index.opened import open_records
    from nvlm.data.loader import Steps, plan_window
    from nvlm.data.look import check_data
    from nvlm.data.outline import build_processor
    from nvlm.inputs.identity import of_records

    config = configured(given.folder, arch, batch)
    processor = build_processor(config, placement_rule(arch))
    assert processor.tokenizer.vocab
    imports, resident = time.process_time() - began, memory()

    def start(step: int) -> tuple[Steps, float]:
        begun = time.process_time()
        records, index = open_records(config.data, config.seed, processor)
        order = build_order(config.data.source, records, config.seed, batch)
        steps = Steps(records, processor, order, 10**9, 1, config.data.row_length, 0, 1, window=8, index=index)
        of_records(config, records)
        plan_window(steps, steps.window_of(step))
        return steps, time.process_time() - begun

    begun = time.process_time()
    check_data(config, placement_rule(arch))
    looked = time.process_time() - begun
    _, first = start(0)
    steps, resumed = start(10 * given.records // batch - 5)
    times = []
    for window in range(given.windows):
        begun = time.process_time()
        plan_window(steps, steps.window_of(1000 + 8 * window))
        times.append((time.process_time() - begun) / (8 * batch))
    return {
        "imports": round(imports, 1),
        "start": round(looked + first, 2),
        "resume": round(resumed, 2),
        "planning": round(float(np.median(times)) * 1e6, 1),
        "imported": round(resident / 1e6),
        "memory": round((memory() - resident) / 1e6),
    }


def memory() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def build(records: int, folder: Path) -> None:
    """Write the index and the file that it is of, unless they are there."""
    from nvlm.arch.registry import placement_rule
    from nvlm.data.content import content_digest
    from nvlm.data.index.files import META, Meta, read_meta
    from nvlm.data.index.state import settings_of, states_of
    from nvlm.data.outline import build_processor

    target, path = folder / "index" / "records", folder / "records.jsonl"
    if (target / META).exists() and read_meta(target).records == records:
        return
    target.mkdir(parents=True, exist_ok=True)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    os.truncate(path, records * BYTES)
    counts = write(records, target)
    config = configured(folder, "hybrid", 256)
    settings = settings_of(config.data.source, "", config.seed, build_processor(config, placement_rule("hybrid")))
    (state,) = states_of([path])
    files = (replace(state, digest=content_digest(path), rows=records),)
    Meta(settings, files, records=records, bad=0, **counts).write(target)


def write(records: int, target: Path) -> dict[str, int]:
    """Write the files of the index; returns the numbers of pictures and text tokens."""
    from nvlm.data.index.files import BADS, PICTURE, PICTURES, PLACES, REASONS, RECORD, RECORDS
    from nvlm.data.sources.json_places import PLACE

    rng, pictures, tokens = np.random.default_rng(0), 0, 0
    with open(target / RECORDS, "wb") as of, open(target / PICTURES, "wb") as images, open(target / PLACES, "wb") as at:
        for first in range(0, records, CHUNK):
            count = min(CHUNK, records - first)
            row, place = np.zeros(count, RECORD), np.zeros(count, PLACE)
            row["text"] = np.clip(rng.lognormal(5, 0.8, count), 10, 1500)
            shown = rng.choice(4, count, p=(0.2, 0.7, 0.05, 0.05))
            row["pictures"] = pictures + np.cumsum(shown) - shown
            image = np.zeros(shown.sum(), PICTURE)
            image["width"], image["height"] = np.array(SIZES)[rng.integers(0, len(SIZES), len(image))].T
            place["start"], place["size"] = (first + np.arange(count)) * BYTES, BYTES
            place["number"] = first + np.arange(count) + 1
            for file, rows in ((of, row), (images, image), (at, place)):
                file.write(rows.tobytes())
            pictures, tokens = pictures + len(image), tokens + int(row["text"].sum())
        of.write(np.array([(0, pictures)], RECORD).tobytes())
    for name in (BADS, REASONS):
        (target / name).write_bytes(b"")
    return {"pictures": pictures, "tokens": tokens}


if __name__ == "__main__":
    main()
