"""Whether a model that learned the built-in pages looks at the tile that is asked for: `benchmarks/looks.py RUN [N]`.

Asks the first N (default 200) of the run's held-out questions of the kind "What stands in <tile_3>?". The numbers are
those of the answer's first token: for how many questions the tile in the question has the largest number, and its mean.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import numpy as np

from nvlm.data.messages import first_question, read_turns
from nvlm.data.sources.registry import build_records
from nvlm.explain.looks import Looks
from nvlm.explain.measure import explained
from nvlm.generate.generator import Conversation, Generator, load
from nvlm.generate.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=4)


def looked(generator: Generator, most: int) -> Iterator[tuple[Looks, int]]:
    """What each answer read, and the tile that was asked for, from 0."""
    records = build_records(generator.config.data, generator.config.seed, heldout=True)
    chosen = [index for index in range(len(records)) if records.kind(index) == "tile"][:most]
    for index in chosen:
        record, _ = first_question(records[index])
        asked = int(re.search(r"<tile_(\d+)>", "".join(read_turns(record.messages)[-1].texts))[1]) - 1
        (answer,) = generator.answers([Conversation(record.messages, record.images)], SAMPLING)
        yield explained(generator, answer), asked


def main(run: str, most: int) -> None:
    """Print the table."""
    with load(run, "train.threads=1") as generator:
        found = list(looked(generator, most))
    first = found[0][0]
    chance = np.mean([1 / len(looks.tiles) for looks, _ in found])
    print(f"{first.arch}, {len(found)} questions{'asked tile is first':>30}  its mean\n{'by chance':34}{chance:6.1%}")
    for number, layer in enumerate(first.layers):
        for name in ("attention", "strength"):
            told(f"{name}, layer {layer}", [(getattr(looks, name)[number, 0], asked) for looks, asked in found])
    told("attention, all layers by gate", [(looks.gated[0], asked) for looks, asked in found])
    told("log-probability lost without it", [(looks.effect[0], asked) for looks, asked in found])


def told(name: str, found: list[tuple[np.ndarray, int]]) -> None:
    """Print one line: how often the asked tile has the largest number, and its mean number."""
    most = np.mean([values_T.argmax() == asked for values_T, asked in found])
    print(f"{name:34}{most:6.1%}{np.mean([values_T[asked] for values_T, asked in found]):10.3f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
