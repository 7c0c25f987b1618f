"""With heads split over two processes, what an answer looks at is what one process finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvlm.arch.pipeline import Pipeline
from nvlm.arch.registry import placement_rule
from nvlm.data.outline import build_processor, outline
from nvlm.data.samples import encode
from nvlm.explain.looks import Looks
from nvlm.explain.measure import looks_of
from nvlm.generate.generator import Generator
from nvlm.processes.groups import distributed
from nvlm.train.loop import build_trainer
from tests.dist.layouts import Case, load_weights, prepare
from tests.dist.run import joined, run_distributed
from tests.models import Story, record_of, small_config

ASKED = Story("asked", (("user", "<image> and <image>?"),), ((3, 1), (1, 2)))
ARCHITECTURES = ("xattn", "hybrid")


def look(config, pipeline, vision, device) -> Looks:
    processor, record = build_processor(config, placement_rule(config.arch.name)), record_of(ASKED)
    plans = outline(record, processor, generate=True).pictures.plans
    answer = [*processor.tokenizer.encode("seven"), processor.tokenizer.end]
    prompt = encode(record, processor, generate=True)
    return looks_of(Generator(config, pipeline, vision, device), prompt, answer, plans)


def look_all(cases: list[Case]) -> list[Looks]:
    found = []
    for case in cases:
        with joined(case.config) as device:
            trainer = build_trainer(case.config, device)
            load_weights(trainer, case.folder / "weights")
            found.append(look(case.config, trainer.pipeline, trainer.vision.within_replica(), device))
            assert trainer.pipeline.parts[0].config.sequence_parallel == case.config.parallel.sequence  # as it was
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[tuple[Case, Looks]]:
    found, threads = [], torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        for arch in ARCHITECTURES:
            config = small_config(f"arch={arch}", "tiling.tag=1d")
            case, twins = prepare(config, tmp_path_factory.mktemp(arch), ())

            class Alone:
                encode = staticmethod(lambda batches, twins=twins: [twins.vision.encode(batch) for batch in batches])

            found.append((case, look(config, Pipeline([twins.model], [], lend=False), Alone, torch.device("cpu"))))
    torch.set_num_threads(threads)
    return found


def test_tensor_parallel_looks_are_those_of_one_process(cases):
    laid_out = [case.laid_out(tensor=2, sequence=case.config.arch.name == "hybrid") for case, _ in cases]
    for rank in run_distributed(look_all, 2, laid_out, timeout=300):
        for (_, expected), looks in zip(cases, rank, strict=True):
            for name in ("gates", "attention", "tags", "strength", "effect"):
                assert np.abs(getattr(looks, name) - getattr(expected, name)).max() < 2e-5, name
            assert looks.tiles == expected.tiles and [t.id for t in looks.tokens] == [t.id for t in expected.tokens]
