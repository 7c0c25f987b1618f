"""Published weights in every layout give the same logits and features as transformers' classes (fp32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from safetensors.torch import save_file
from torch import Tensor

from nvlm.arch.pipeline import build_parts, build_pipeline
from nvlm.attention.context import gather_columns
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.data.batch import Batch
from nvlm.data.pack import collate
from nvlm.inputs.sources import model_source
from nvlm.train.begin import begin
from nvlm.vision.path import build_vision, load_encoder
from nvlm.weights.parts import published
from tests.dist.run import joined, run_distributed
from tests.published import (
    LANGUAGES,
    SMALL,
    encoder_model,
    internvit_names,
    language_model,
    write_release,
)

NEAR = dict(rtol=1e-4, atol=1e-4)  # worst seen 2.2e-6, of logits up to 3.8
LENGTHS = (13, 29, 22)
LAYOUTS = {
    1: {"one process": ()},
    2: {
        "tensor 2": ("parallel.tensor=2",),
        "tensor 2, sequence": ("parallel.tensor=2", "parallel.sequence=true"),
        "pipeline 2": ("parallel.pipeline=2",),
        "pipeline 2 x virtual 2": ("parallel.pipeline=2", "parallel.virtual=2"),
        "context 2": ("parallel.context=2",),
        "data 2": (),
    },
    4: {"tensor 2 x pipeline 2": ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2")},
}


def words(config: Config) -> Tensor:
    """Random ids [B, S], including the last of the vocabulary."""
    ids = torch.randint(config.llm.vocab, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = config.llm.vocab - 1
    return ids


def text_batch(config: Config) -> Batch:
    """Those ids as rows of text, of different lengths."""
    from nvlm.data.batch import Sample

    none = torch.zeros(0, dtype=torch.long)
    tile = config.vision.tile_size
    samples = []
    for row, length in zip(words(config), LENGTHS):
        sample = Sample(
            id="text", tokens=row[:length], labels=torch.full((length,), -100), image=torch.full((length,), -1),
            tile=torch.full((length,), -1), stream_rows=none, cross_tokens=none, cross_image=none, cross_tile=none,
            cross_rows=none, cross_lengths=(), cross_tags=(), tile_tokens=none,
            holder=none, mixed_rows=torch.zeros(0, 4, dtype=torch.long), mixed_weights=torch.zeros(0, 4),
            mixed_largest=torch.zeros(0, dtype=torch.bool),
            pixels=torch.zeros(0, 3, tile, tile, dtype=torch.uint8),
        )  # fmt: skip
        samples.append([sample])
    return collate(samples, tile, config.row_multiple)


@torch.no_grad()
def whole_logits(config: Config, parts: list) -> Tensor | None:
    """Logits [B, S, V] of the batch through all stages; on the ranks of the last one."""
    batch = text_batch(config)
    batch = batch.with_features(torch.zeros(0, 4 * config.vision.hidden))
    stages = build_pipeline(config, parts)
    stages.begin([batch])
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    rank = ranks.index(dist.get_rank())
    for part in parts:
        part.eval().config.apply_rope_fusion = False  # its kernels take one row
        part.config.fused_single_qkv_rope = False
        if not part.pre_process:
            shape = list(batch.tokens.shape[::-1]) + [config.llm.hidden]
            shape[0] //= config.parallel.context * (config.parallel.tensor if config.parallel.sequence else 1)
            received = torch.empty(shape)
            dist.recv(received, ranks[rank - 1])
            part.set_input_tensor(received)
        hidden = part.hidden(batch)
        if not part.post_process:
            dist.send(hidden.contiguous(), ranks[(rank + 1) % len(ranks)])
    if not part.post_process:
        return None
    if part.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(part.logits(hidden))
    return gather_columns(logits).transpose(0, 1)[..., : config.llm.vocab]


def logits_of(layouts: list[tuple[str, ...]], overrides: tuple[str, ...]) -> list[Tensor | None]:
    """Logits by layout, on this rank; weights that were not read would show up as NaN."""
    results = []
    for layout in layouts:
        config = compose_config(*SMALL, *overrides, *layout)
        with joined(config):
            parts = build_parts(config)
            for part in parts:
                for name, parameter in part.named_parameters():
                    if not name.startswith("projector."):
                        parameter.data.fill_(torch.nan)
            begin(parts, config)
            results.append(whole_logits(config, parts))
    return results


IN_LAYOUTS = ("qwen3",)  # the others in make test-all
ALL = [
    pytest.param(kind, world, marks=[pytest.mark.slow] if world > 2 or world == 2 and kind not in IN_LAYOUTS else [])
    for kind in LANGUAGES
    for world in LAYOUTS
]


@pytest.mark.parametrize(("kind", "world"), ALL)
def test_logits_are_those_of_transformers_in_every_layout(tmp_path, kind, world):
    config = compose_config(*SMALL, *LANGUAGES[kind])
    model = language_model(config, family="Mistral" if kind == "mistral" else None)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with torch.no_grad():
        expected = model(words(config)).logits
    layouts = list(LAYOUTS[world].values())
    by_rank = run_distributed(logits_of, world, layouts, (*LANGUAGES[kind], f"init.llm={tmp_path}"))
    for number, layout in enumerate(LAYOUTS[world]):
        told = [results[number] for results in by_rank if results[number] is not None]
        assert told, layout
        for logits in told:
            for row, length in enumerate(LENGTHS):
                torch.testing.assert_close(logits[row, :length], expected[row, :length], **NEAR, msg=layout)


VISIONS = {
    "InternViT-6B": (),
    "InternViT-300M": ("vision.norm=layer", "vision.qkv_bias=true", "vision.qk_norm=false"),
}


def features_of(overrides: tuple[str, ...], pixels: Tensor) -> Tensor:
    """Patch features of normalised pixels, in this process."""
    config = compose_config(*SMALL, *overrides)
    with joined(config) as device, torch.no_grad():
        return build_vision(config, device).encoder(pixels).clone()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", VISIONS)
def test_features_are_those_of_transformers(tmp_path, kind, world):
    config = compose_config(*SMALL, *VISIONS[kind])
    model = encoder_model(config)
    pixels = torch.randn(3, 3, config.vision.tile_size, config.vision.tile_size)
    with torch.no_grad():
        expected = model.encoder(model.embeddings(pixels)[0] if isinstance(model.embeddings(pixels), tuple)
                                 else model.embeddings(pixels)).last_hidden_state[:, 1:]  # fmt: skip
    save_file(internvit_names(model.state_dict(), config.vision.layers), tmp_path / "model.safetensors")
    layout = (f"parallel.tensor={world}", f"init.vision={tmp_path}")
    for features in run_distributed(features_of, world, (*VISIONS[kind], *layout), pixels):
        torch.testing.assert_close(features, expected, **NEAR)


def release_in_layout(overrides: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    """Tensors of this rank's pipeline stage, read from a release, under their published names."""
    config = compose_config(*SMALL, *overrides, f"init.release={folder}", "init.vision=null")
    with joined(config) as device:
        parts = build_parts(config)
        origins = begin(parts, config)
        source = model_source(config)
        encoder = {n: p.data for n, p in load_encoder(config, device).named_parameters()}
        held = {name: tensor for part in parts for name, tensor in part.weights().items()}
        given = [part for group, some in source.parts.items() if group != "vision" for part in some]
        out = published([part for part in given if part.ours in held], held)
        assert {group for group, origin in origins.items() if origin == str(folder)} == set(source.parts)
        return out | published(source.parts["vision"], encoder)


@pytest.mark.parametrize(("arch", "dummy_heads"), [("decoder", 3), ("xattn", 0), ("hybrid", 3)])
def test_a_release_is_read_whole(tmp_path, arch, dummy_heads):
    config = compose_config(*SMALL, f"arch={arch}", "llm.cross_every=2")
    held = write_release(tmp_path / "release", config, dummy_heads, torch.float32)
    options = (f"arch={arch}", "llm.cross_every=2")
    [one] = run_distributed(release_in_layout, 1, options, tmp_path / "release")
    assert one.keys() == held.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in held.items())
    stages = run_distributed(release_in_layout, 2, (*options, "parallel.pipeline=2"), tmp_path / "release")
    both = stages[0] | stages[1]
    assert both.keys() == held.keys()
    assert all(torch.equal(both[name], tensor) for name, tensor in held.items())
