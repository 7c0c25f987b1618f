"""Every layout that can generate gives the same tokens as one process, greedy and sampled (fp32)."""

from __future__ import annotations

import pytest
import torch

from nvlm.arch.pipeline import Pipeline
from nvlm.data.pack import collate
from nvlm.generate.decode import continue_rows
from nvlm.generate.sampling import Sampling
from nvlm.processes.groups import distributed
from nvlm.train.loop import build_trainer
from tests.dist.layouts import Case, load_weights, prepare
from tests.dist.run import joined, run_distributed
from tests.models import TILE, sample_of, small_config
from tests.stories import ONE, TEXT, TWO

STORIES = (TWO, TEXT, ONE)
SAMPLINGS = (Sampling(max_new_tokens=10), Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=11))
LAYOUTS = {
    2: {
        "tensor 2": dict(tensor=2),
        "tensor 2, trained with sequence parallelism": dict(tensor=2, sequence=True),
        "pipeline 2": dict(pipeline=2),
        "pipeline 2 x virtual 2": dict(pipeline=2, virtual=2),
        "context 2, recomputed": dict(context=2),
    },
    4: {
        "tensor 2 x pipeline 2": dict(tensor=2, sequence=True, pipeline=2),
        "pipeline 4": dict(pipeline=4),
    },
}
ALL = [
    pytest.param(world, layout, id=layout, marks=[pytest.mark.slow] if world > 2 else [])
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]
MODELS = {"decoder": (), "xattn": (), "hybrid": ("llm.tied=true", "arch.sees=latest")}


def batch_of(config):
    samples = [[sample_of(story, config)] for story in STORIES]
    return collate(samples, TILE, config.row_multiple)


def generate_all(cases: list[Case]) -> list[list[list[list[int]]]]:
    """The generated rows, by case and sampling."""
    return [generate(case) for case in cases]


def generate(case: Case) -> list[list[list[int]]]:
    with joined(case.config) as device:
        trainer = build_trainer(case.config, device)
        load_weights(trainer, case.folder / "weights")
        stages, config = trainer.pipeline, trainer.pipeline.parts[0].config
        (batch,) = trainer.vision.within_replica().encode([batch_of(case.config).to(device)])
        multiple = case.config.row_multiple
        texts = [continue_rows(stages, batch, sampling, [case_stop(case)], multiple) for sampling in SAMPLINGS]
        assert config.sequence_parallel == case.config.parallel.sequence  # as it was
        return texts


def case_stop(case: Case) -> int:
    return int((case.folder / "stop").read_text())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Each model's case, and what one process generates, with a row that ends early."""
    found, threads = {}, torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        for arch, overrides in MODELS.items():
            config = small_config(f"arch={arch}", "llm.layers=4", "tiling.tag=1d", *overrides)
            folder = tmp_path_factory.mktemp(arch)
            case, twins = prepare(config, folder, ())
            batch, stages = twins.vision.encode(batch_of(config)), Pipeline([twins.model], [], lend=False)
            stop = continue_rows(stages, batch, SAMPLINGS[0], ())[1][3]
            (folder / "stop").write_text(str(stop))
            found[arch] = case, [continue_rows(stages, batch, sampling, [stop]) for sampling in SAMPLINGS]
            assert len({len(text) for text in found[arch][1][0]}) > 1
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def outcomes(expected):
    done: dict[int, dict] = {}

    def of(world: int, layout: str, arch: str) -> list:
        if world not in done:
            keys = [(layout, arch) for layout in LAYOUTS[world] for arch in MODELS]
            cases = [expected[arch][0].laid_out(**LAYOUTS[world][layout]) for layout, arch in keys]
            done[world] = dict(zip(keys, zip(*run_distributed(generate_all, world, cases, timeout=600))))
        return done[world][layout, arch]

    return of


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize(("world", "layout"), ALL)
def test_a_layout_gives_the_tokens_of_one_process(world, layout, arch, expected, outcomes):
    for rank in outcomes(world, layout, arch):
        assert rank == expected[arch][1]
