"""Low-rank adapters in every layout: gradients, checkpoints that any layout can read, dropout on which ranks agree.

Tolerance as in test_layouts: 1e-5 of each tensor's largest value (worst seen 3e-6).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.samples import encode
from nvlm.data.sources.registry import build_records
from nvlm.export.export import export
from nvlm.export.modeling_nvlm import NVLM
from nvlm.export.options import parse
from nvlm.inputs.check import check_same_model
from nvlm.inputs.sources import model_source
from nvlm.processes.groups import distributed
from nvlm.runs.ownership import begin as begin_folder
from nvlm.train.checkpoint import restore
from nvlm.train.checkpoint.save import FROZEN, latest
from nvlm.weights.merge import is_adapter
from tests.dist.checkpoints import FP32, assert_same, begin, built, pass_on, saved, tensors_in
from tests.dist.layouts import (
    MICRO_BATCHES,
    Case,
    metadata,
    outcomes_of,
    prepare,
    reference_gradients,
    run_cases,
    step_in_layout,
)
from tests.dist.run import joined, run_distributed
from tests.models import Twins, adapter_gradients, small_config
from tests.near import assert_gradients_near

LORA = ("peft=lora", "peft.rank=3", "peft.alpha=5", "stage.new=[]")  # cross-attention that has learned before
LAYOUTS = {
    1: {"one process": dict()},
    2: {
        "tensor 2": dict(tensor=2),
        "tensor 2, sequence": dict(tensor=2, sequence=True),
        "tensor 2, distributed optimizer": dict(tensor=2, distributed_optimizer=True),
        "pipeline 2": dict(pipeline=2),
        "pipeline 2 x virtual 2": dict(pipeline=2, virtual=2),
        "context 2": dict(context=2),
        "data 2": dict(),
    },
    4: {
        "tensor 2 x pipeline 2": dict(tensor=2, sequence=True, pipeline=2),
        "tensor 2 x context 2": dict(tensor=2, sequence=True, context=2),
    },
}
ALL = [
    pytest.param(world, layout, id=layout, marks=[pytest.mark.slow] if world > 2 else [])
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


class Expected:
    """The reference's gradients of adapters whose weights it has merged, and where ours are."""

    def __init__(self, folder: Path) -> None:
        config = small_config("arch=hybrid", *LORA, "llm.layers=4", "tiling.tag=1d")
        self.case: Case
        self.twins: Twins
        self.case, self.twins = prepare(config, folder, MICRO_BATCHES)
        self.loss, gradients = reference_gradients(self.twins, self.case)
        self.adapters = adapter_gradients(self.twins, gradients)
        self.projector = {name: g for name, g in gradients.items() if name.startswith("mlp1.")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Iterator[Expected]:
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        yield Expected(tmp_path_factory.mktemp("model"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcomes(expected, tmp_path_factory):
    """What layouts.outcomes_of returns, by layout."""

    def cases(world: int) -> dict[str, Case]:
        return {layout: expected.case.laid_out(**sizes) for layout, sizes in LAYOUTS[world].items()}

    return outcomes_of(cases, tmp_path_factory)


@pytest.mark.parametrize(("world", "layout"), ALL)
def test_gradients_equal_the_references_by_the_chain_rule(world, layout, expected, outcomes):
    ranks, out = outcomes(world, layout)
    wanted = expected.adapters | expected.projector
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss, rel=1e-5)
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert rank.grad_norm == pytest.approx(float(norm), rel=1e-5)
    state = expected.twins.model.sharded_state_dict(metadata=metadata())
    got = dist_checkpointing.load({"part0": state}, str(out))["part0"]
    assert_gradients_near({name: got[name] for name in expected.adapters}, expected.adapters)
    frozen = [n for n, t in got.items() if torch.is_tensor(t) and not n.startswith("projector.") and not is_adapter(n)]
    assert frozen and not any(got[name].any() for name in frozen)


def dropping(case: Case) -> Case:
    """The same with dropout in the adapters."""
    return replace(case, config=replace(case.config, peft=replace(case.config.peft, dropout=0.5)))


@pytest.fixture(scope="module")
def whole(expected, tmp_path_factory):
    """One process's loss and gradients with dropout, each row in its own micro-batch."""
    rows = tuple((row,) for rows in expected.case.micro_batches for row in rows)
    out = tmp_path_factory.mktemp("dropout") / "one"
    [outcome] = run_distributed(step_in_layout, 1, replace(dropping(expected.case), micro_batches=rows), out)
    assert outcome.loss != pytest.approx(expected.loss, rel=1e-3)
    return outcome, adapters_in(expected, out)


def adapters_in(expected: Expected, out: Path) -> dict[str, torch.Tensor]:
    """The adapters' gradients that a layout wrote."""
    state = expected.twins.model.sharded_state_dict(metadata=metadata())
    got = dist_checkpointing.load({"part0": state}, str(out))["part0"]
    return {name: got[name] for name in expected.adapters}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_drops_the_same(world, expected, whole, tmp_path):
    cases = [(dropping(expected.case.laid_out(**sizes)), tmp_path / name) for name, sizes in LAYOUTS[world].items()]
    for recompute in ("selective", "full"):
        case, out = cases[-1]
        config = replace(case.config, train=replace(case.config.train, recompute=recompute))
        cases.append((replace(case, config=config), out.with_name(f"{out.name}, recomputed: {recompute}")))
    for rank in run_distributed(run_cases, world, cases):
        for outcome, (_, out) in zip(rank, cases):
            assert outcome.loss == pytest.approx(whole[0].loss, rel=1e-5), out.name
            assert outcome.grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-5), out.name
    for _, out in cases:
        assert_gradients_near(adapters_in(expected, out), whole[1])


# --- checkpoints ---

RUN = (*FP32, *LORA)


def compare(runs: list[Path]) -> None:
    """All have the same contents; the base's weights are only in `frozen`."""
    with joined(small_config()):
        first = tensors_in(latest(runs[0]))
        for run in runs[1:]:
            assert_same(tensors_in(latest(run)), first)
        frozen = dist_checkpointing.load_plain_tensors(str(latest(runs[0]).parent / FROZEN))
        assert "decoder.layers.0.self_attention.linear_qkv.weight" in frozen
        assert "decoder.layers.3.cross_attention.gate" in frozen and not any(map(is_adapter, frozen))
        rest = first.keys() - frozen.keys()
        names = {name.removeprefix("optimizer.state.exp_avg.") for name in rest if ".exp_avg." in name}
        assert names and all(is_adapter(name) or name.startswith("projector.") for name in names)
        up = first["decoder.layers.0.mlp.linear_fc1.adapter.up.weight"]
        assert up.any() and "decoder.layers.3.cross_attention.linear_kv.adapter.down.weight" in rest


def test_a_checkpoint_of_one_layout_is_read_by_another(tmp_path):
    ways = (("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2", "train.micro_batch=1"), ())
    [expected] = run_distributed(begin, 1, RUN, tmp_path / "0")
    for number, layout in enumerate(ways):
        world = 2 if layout else 1
        went = run_distributed(pass_on, world, (*RUN, *layout), tmp_path / f"{number}", tmp_path / f"{number + 1}")
        for got, wanted in zip(went[0], expected):
            assert got == pytest.approx(wanted, rel=1e-4), layout
    run_distributed(compare, 1, [tmp_path / f"{number}" for number in range(len(ways) + 1)])


def step_from(overrides: tuple[str, ...], base: Path, run: Path) -> None:
    """Start with the weights of `base`, make two steps, save."""
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device)
        assert restore.load_weights(trainer.pipeline.parts, latest(base)) == []
        for _ in range(2):
            step()
        saved(trainer, overrides, run, 2)


def only_adapters_moved(base: Path, run: Path) -> None:
    with joined(small_config()):
        before, after = tensors_in(latest(base)), tensors_in(latest(run))
        weights = {name for name in before if not name.startswith("optimizer.")}
        adapters = {name for name in after if is_adapter(name) and not name.startswith("optimizer.")}
        assert {name for name in after if not name.startswith("optimizer.")} == weights | adapters
        for name in weights:
            assert torch.equal(before[name], after[name]) == (not name.startswith("projector.")), name
        for name in adapters:
            assert after[name].any(), name


BESIDE = (*FP32, "arch=xattn", "peft=lora", "peft.rank=3", "optim.lr=0.01", "optim.warmup=1")


def with_more_adapters(base: Path) -> None:
    """After a run with adapters only on the language model, the next stage adds adapters to cross-attention."""
    with joined(compose_config(*BESIDE, "stage.new=[]")) as device:
        trainer, step = built((*BESIDE, "stage.new=[]"), device)
        assert restore.load_weights(trainer.pipeline.parts, latest(base)) == []
        weights = dict(trainer.pipeline.parts[0].named_parameters())
        before = tensors_in(latest(base))
        up = {name for name in weights if name.endswith("adapter.up.weight")}
        assert {name for name in up if weights[name].any()} == up & before.keys() != up
        step()


def test_a_group_may_get_adapters_that_the_stage_before_did_not_have(tmp_path):
    run_distributed(train_and_save, 1, BESIDE, tmp_path / "base")
    run_distributed(with_more_adapters, 1, tmp_path / "base")


def test_steps_from_another_runs_weights_move_adapters_alone(tmp_path):
    run_distributed(begin, 1, FP32, tmp_path / "base")
    run_distributed(step_from, 2, (*RUN, "parallel.tensor=2"), tmp_path / "base", tmp_path / "lora")
    run_distributed(only_adapters_moved, 1, tmp_path / "base", tmp_path / "lora")
    with pytest.raises(AssertionError, match=r"adapter\.\w+\.weight, which this run does not have"):
        run_distributed(step_from, 1, FP32, tmp_path / "lora", tmp_path / "plain")


# --- export ---


def train_and_save(overrides: tuple[str, ...], run: Path) -> None:
    """Two steps and a checkpoint, in a run folder."""
    config = compose_config(*overrides)
    with joined(config) as device:
        trainer, step = built(overrides, device)
        for _ in range(2):
            step()
        if dist.get_rank() == 0:
            begin_folder(config, run, fresh=True)
        dist.barrier()
        saved(trainer, overrides, run, 2)


def differ_from_exported(overrides: tuple[str, ...], run: Path, out: Path) -> float:
    """Largest difference between the trainer's logits and those from the exported folder's own code."""
    config = compose_config(*overrides)
    with joined(config) as device:
        trainer, _ = built(overrides, device)
        restore.load(trainer, latest(run))
        record = build_records(config.data, config.seed)[0]
        sample = encode(record, build_processor(config, placement_rule(config.arch.name), resize="exact"))
        batch = trainer.vision.encode([collate([[sample]], config.vision.tile_size)])[0]
        [model] = trainer.pipeline.parts
        with torch.no_grad():
            expected = model.logits(model.hidden(batch))[: len(sample.tokens), 0]
    model = NVLM.from_folder(out, dtype=torch.float32)
    got = model.logits(model.inputs(record.messages, record.images))
    return float((got - expected[:, : got.shape[1]]).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("arch", "peft"), [("decoder", "none"), ("xattn", "lora"), ("hybrid", "lora")])
def test_an_exported_run_gives_the_trainers_logits(tmp_path, arch, peft):
    overrides = (*RUN, f"arch={arch}", f"peft={peft}", "optim.lr=0.01", "optim.warmup=1")
    run_distributed(train_and_save, 2, (*overrides, "parallel.tensor=2"), tmp_path / "run")
    export(parse([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]))
    names = safetensors_names(tmp_path / "out")
    assert names and not any("adapter" in name for name in names)
    [differ] = run_distributed(differ_from_exported, 1, overrides, tmp_path / "run", tmp_path / "out")
    assert differ < 1e-5
    assert_begins_full_fine_tuning(arch, tmp_path / "run", tmp_path / "out", refused=peft == "lora")


def assert_begins_full_fine_tuning(arch: str, run: Path, out: Path, refused: bool) -> None:
    """A run's adapters are not lost on the way to full fine-tuning: the message names a way, and it works."""
    if refused:
        way = r"export_hf.py checkpoint=\S+/run out=DIR\) and start with init.release=DIR init.vision=null"
        with pytest.raises(ConfigError, match=way):
            check_same_model(compose_config(*RUN, f"arch={arch}", "peft=none"), latest(run))
    source = model_source(compose_config(*RUN, f"arch={arch}", "peft=none", f"init.release={out}", "init.vision=null"))
    assert set(source.parts) == {"vision", "projector", "llm"} | ({"xattn"} if arch != "decoder" else set())


def safetensors_names(folder: Path) -> list[str]:
    """All tensors of a folder."""
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
