"""FLOPs by formula compared with torch's own counter on real models, and their counts compared with visibility.

torch counts what is computed: on CPU all pairs of a sample, even masked ones, and some padding. So the formula gets
these counts here; another test checks the real ones. The math kernel replaces the fused kernels, whose work torch's
counter does not see on CPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nvlm.arch.pipeline import build_parts
from nvlm.attention.kernels import per_sample
from nvlm.attention.visibility import causal_mask, visible
from nvlm.data.amounts import Work
from nvlm.data.batch import PAD, Batch
from nvlm.data.pack import collate
from nvlm.data.work import count_work
from nvlm.estimate.flops import backward, forward, hardware_flops, model_flops
from nvlm.estimate.lengths import plan_of, sample_work
from nvlm.train.optim import freeze
from nvlm.vision.back import with_leaf
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import VisionPath, solo_groups
from tests.models import Story, sample_of, small_config
from tests.stories import GRIDS, INPUTS, ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO, VIDEO

ARCHITECTURES = ("decoder", "xattn", "hybrid")
STAGES = {
    "pretrain": ("stage=pretrain",),
    "sft": ("stage=sft",),
    "language model alone": ("stage=sft", "stage.train_projector=false", "stage.train_xattn=false"),
    "projector alone": ("stage=pretrain", "stage.train_xattn=false"),
    "adapters": ("stage=sft", "peft=lora", "peft.rank=3", "stage.new=[]"),
    "adapters beside new modules": ("stage=sft", "peft=lora", "peft.rank=3"),
    "recomputed pretrain": ("stage=pretrain", "train.recompute=full"),
    "recomputed sft": ("stage=sft", "train.recompute=full"),
    "selectively recomputed pretrain": ("stage=pretrain", "train.recompute=selective"),
    "selectively recomputed sft": ("stage=sft", "train.recompute=selective"),
    "another encoder": ("stage=sft", "vision.norm=layer", "vision.qk_norm=false", "vision.qkv_bias=true"),
    "cross-attention in every layer": ("stage=pretrain", "arch.cross_every=1"),
    "idle adapters": ("stage=pretrain", "peft=lora", "peft.rank=3", "stage.new=[]"),
}
CASES = [(arch, name) for arch in ARCHITECTURES for name in STAGES]
NOT_OF_D = ("cross-attention in every layer", "idle adapters")  # D has none, and adapters would all be idle


pytestmark = pytest.mark.usefixtures("megatron")


def batch_for(config, rows) -> Batch:
    return collate([[sample_of(story, config) for story in row] for row in rows], config.vision.tile_size)


def dense(batch: Batch, config) -> Work:
    """The work including computed padding and masked pairs."""
    (rows, length), keys = batch.tokens.shape, batch.cross_tokens.shape[1]
    samples = [torch.bincount(row[row != PAD]).tolist() for row in batch.sample]
    if config.arch.name == "decoder":  # in a line, with as much padding as makes its length even
        samples = [sum(samples, [])]
        length = sum(samples[0]) + -sum(samples[0]) % config.row_multiple
    for sizes in samples:  # the padding of a row goes with its last sample
        sizes[-1] += length - sum(sizes)
    return dataclasses.replace(
        count_work(batch),
        tokens=len(samples) * length,
        pairs=sum(size**2 for sizes in samples for size in sizes),
        keys=rows * keys,
        cross_pairs=rows * length * keys,
    )


@pytest.mark.parametrize(("arch", "stage"), [c for c in CASES if c[0] != "decoder" or c[1] not in NOT_OF_D])
def test_torch_counts_the_same(arch, stage, monkeypatch):
    monkeypatch.setattr(per_sample, "WORTH_A_CALL", 0)  # samples go apart, however short
    config = small_config(f"arch={arch}", *STAGES[stage])
    (model,) = build_parts(config)
    freeze(model, config)
    vision = VisionPath(InternViT(config, solo_groups()), config.vision)
    batch = batch_for(config, [[TWO, TEXT, ONE_TILE], [SIDE_BY_SIDE, ONE], [TEXT]])
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as first:
            loss = model.train()(vision.encode(batch)).sum()
        with FlopCounterMode(display=False) as second:
            loss.backward()
    work = dense(batch, config)
    ahead, both = forward(config, work).total, hardware_flops(config, work).total
    assert first.get_total_flops() == ahead  # to the last product: 2% would hide a whole projector
    assert second.get_total_flops() == both - ahead
    if config.train.recompute == "none":
        assert both == model_flops(config, work).total


@pytest.mark.parametrize(
    "stage", [("stage=sft",), ("stage=pretrain",), ("stage=sft", "train.recompute=full")], ids=" ".join
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torch_counts_the_same_for_an_encoder_that_learns(arch, stage, monkeypatch):
    monkeypatch.setattr(per_sample, "WORTH_A_CALL", 0)
    config = small_config(f"arch={arch}", "stage.train_vision=true", *stage)
    (model,) = build_parts(config)
    freeze(model, config)
    encoder = InternViT(config, solo_groups())
    if config.train.recompute == "full":  # as train.encoder sets it
        encoder.config.recompute_granularity, encoder.config.recompute_method = "full", "uniform"
        encoder.config.recompute_num_layers = 1
    vision = VisionPath(encoder, config.vision, learns=True)
    batch = batch_for(config, [[TWO, TEXT, ONE_TILE], [SIDE_BY_SIDE, ONE], [TEXT]])
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as first:
            encoded, leaf = with_leaf(vision.encode(batch))
            loss = model.train()(encoded).sum()
        with FlopCounterMode(display=False) as second:
            loss.backward()
            vision.backward(batch.pixels, leaf.features.grad)
    work = dense(batch, config)
    ahead, both = forward(config, work).total, hardware_flops(config, work).total
    assert first.get_total_flops() == ahead
    assert second.get_total_flops() == both - ahead
    again = hardware_flops(config, work).vision - model_flops(config, work).vision
    layers = forward(config, work).vision  # encoded again, and with recomputation all but the patches a third time
    assert layers <= again <= (2 if config.train.recompute == "full" else 1) * layers


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pairs_are_those_that_see_each_other(arch, name):
    batch = batch_for(small_config(f"arch={arch}"), INPUTS[name])
    work, columns = count_work(batch), torch.arange(batch.tokens.shape[1])
    numbers = (batch.sample, batch.image, batch.tile, batch.cross_sample, batch.cross_image, batch.cross_tile)
    assert work.pairs == int((~causal_mask(batch.sample, columns, columns)).sum())
    assert work.cross_pairs == int(visible(*numbers).sum())
    assert work.tokens == batch.num_tokens and work.outputs == batch.num_trained
    assert work.keys == int((batch.cross_sample != PAD).sum())
    if arch == "decoder":
        assert work.keys == work.cross_pairs == 0


def test_pairs_of_random_numbers():
    """Images without keys, keys of images that no text has started, tags of missing tiles, empty rows."""
    generator = torch.Generator().manual_seed(3)
    batch = batch_for(small_config("arch=xattn"), [[ONE]])
    for _ in range(30):

        def draw(low: int, high: int, columns: int) -> torch.Tensor:
            return torch.randint(low, high, (4, columns), generator=generator)

        sample, cross_sample = draw(-1, 3, 24), draw(-1, 3, 17)
        case = dataclasses.replace(
            batch,
            sample=sample,
            image=torch.where(sample == PAD, PAD, draw(-1, 4, 24)),
            tile=draw(-2, 5, 24),  # all tiles, those of the latest image, or one
            positions=draw(0, 9, 24),
            cross_sample=cross_sample,
            cross_image=torch.where(cross_sample == PAD, PAD, draw(0, 3, 17)),
            cross_tile=torch.where(cross_sample == PAD, PAD, draw(0, 6, 17)),
        )
        numbers = (case.sample, case.image, case.tile, case.cross_sample, case.cross_image, case.cross_tile)
        assert count_work(case).cross_pairs == int(visible(*numbers).sum())


@pytest.mark.parametrize("tiles", GRIDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sample_of_one_image_is_foretold(arch, tiles):
    """The planner's assumptions match the pipeline's samples; here the text before the image is known, too."""
    config = small_config(f"arch={arch}")
    story = Story("told", (("user", "<image>"), ("assistant", "seven of them")), (GRIDS[tiles],))
    got = count_work(batch_for(config, [[story]]))
    text = got.tokens - sample_work(config, 0, plan_of(config, tiles)).tokens
    told = sample_work(config, text, plan_of(config, tiles))
    in_front = int((batch_for(config, [[story]]).image == PAD).sum()) - int(
        (batch_for(config, [[story]]).sample == PAD).sum()
    )
    assert 0 < got.outputs < told.outputs
    assert got == dataclasses.replace(told, cross_pairs=told.cross_pairs - in_front * told.keys, outputs=got.outputs)


@pytest.mark.parametrize("pooled", ["after", "before"])
def test_a_sample_of_one_video_is_foretold(pooled):
    shown = ("video.frames=5", "video.pool=average", f"video.before_projector={str(pooled == 'before').lower()}")
    config = small_config("arch=decoder", *shown)
    got = count_work(batch_for(config, [[VIDEO]]))
    plan = plan_of(config, 0, frames=5)
    told = sample_work(config, got.tokens - sample_work(config, 0, plan).tokens, plan)
    assert got.tiles == 5
    assert got == dataclasses.replace(told, outputs=got.outputs)


def test_text_alone_is_foretold():
    config = small_config("arch=hybrid")
    got = count_work(batch_for(config, [[TEXT]]))
    assert got == dataclasses.replace(sample_work(config, got.tokens, None), outputs=got.outputs)


def test_work_adds_up_over_rows():
    config = small_config("arch=hybrid")
    rows = INPUTS["packed rows"]
    whole = count_work(batch_for(config, rows))
    assert whole == sum((count_work(batch_for(config, [[story]])) for row in rows for story in row), Work())
    parts = [count_work(batch_for(config, [row])) for row in rows]
    assert model_flops(config, whole).total == sum(model_flops(config, part).total for part in parts)


def test_padding_costs_nothing_in_the_model_s_count():
    config = small_config("arch=xattn")
    samples = [[sample_of(TEXT, config)], [sample_of(TWO, config)]]
    tight, wide = (collate(samples, config.vision.tile_size, multiple) for multiple in (8, 512))
    assert wide.tokens.numel() > 2 * tight.tokens.numel()
    assert count_work(tight) == count_work(wide)
    assert backward(config, dense(wide, config)).total > 2 * backward(config, dense(tight, config)).total


@pytest.mark.parametrize(("letter", "petaflops"), [("d", 0.68), ("x", 0.32), ("h", 0.37)])
def test_the_paper_s_samples_cost_what_is_estimated_of_them(configured, letter, petaflops):
    """Yi-34B, SFT, 1024 tokens of text and 6 + 1 tiles without tags (NVLM Table 3). The estimates assume ungrouped keys
    and values in cross-attention, where ours are grouped: 10 TF of X, 8 TF of H."""
    config = configured(f"+experiment=nvlm_{letter}_34b_sft", "dry_run=true", "tiling.tag=none")
    grouped = model_flops(config, sample_work(config, 1024, plan_of(config, 6)))
    llm = dataclasses.replace(config.llm, kv_heads=config.llm.heads)
    ungrouped = model_flops(dataclasses.replace(config, llm=llm), sample_work(config, 1024, plan_of(config, 6)))
    total = grouped.total + ungrouped.cross_linears - grouped.cross_linears
    assert total / 1e15 == pytest.approx(petaflops, abs=0.006)
    assert grouped.vision / 1e15 == pytest.approx(0.084, abs=0.0005)
