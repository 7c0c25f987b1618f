"""From a published folder into a trainer of any layout and back into a folder: bit for bit, or refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvlm.commands.compose import compose_config
from nvlm.commands.export import main
from nvlm.config.values import ConfigError
from nvlm.data.text.tokenizer import TINY
from nvlm.export.describe import describe
from nvlm.export.export import export
from nvlm.export.options import parse
from nvlm.export.shards import ShardWriter
from nvlm.export.text import Text
from nvlm.inputs.sources import whole_model
from nvlm.runs.ownership import begin as begin_folder
from nvlm.train.checkpoint.save import Checkpoints
from nvlm.train.loop import build_trainer
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.weights.parts import shapes
from tests.dist.run import joined, run_distributed
from tests.published import SMALL, write_release, write_shards

OPTIONS = ("llm.cross_every=2", "train.steps=2", "optim.warmup=0", "init.vision=null", "llm.tokenizer=tiny")
LAYOUTS = {
    1: (),
    2: ("parallel.tensor=2", "parallel.sequence=true"),
    4: ("parallel.tensor=2", "parallel.pipeline=2", "parallel.distributed_optimizer=true"),
}


def train_nothing(overrides: tuple[str, ...], run: Path) -> None:
    """A run that starts from what `overrides` name and saves before its first step."""
    config = compose_config(*SMALL, *OPTIONS, *overrides)
    with joined(config) as device:
        trainer = build_trainer(config, device)
        if torch.distributed.get_rank() == 0:
            begin_folder(config, run, fresh=True)
        torch.distributed.barrier()
        with Checkpoints(config.train, run) as checkpoints:
            checkpoints.save(trainer, 1)


def exported(run: Path, out: Path, *more: str) -> Path:
    """Run the export command."""
    return export(parse([f"checkpoint={run}", f"out={out}", "shard_gb=0.00003", *more]))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the index."""
    found = {}
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and every bit."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_load_then_export_is_bit_equal(tmp_path, arch, stage, world):
    shape = (f"arch={arch}", "precision=bf16", f"stage={stage}")
    config = compose_config(*SMALL, *OPTIONS, *shape)
    held = write_release(tmp_path / "release", config, dummy_heads=3, dtype=torch.bfloat16)
    options = (*shape, *LAYOUTS[world], f"init.release={tmp_path / 'release'}")
    run_distributed(train_nothing, world, options, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/frozen").is_dir() == (stage == "pretrain")
    out = exported(tmp_path / "run", tmp_path / "out")
    assert_same(tensors_in(out), held)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert not list(tmp_path.glob(".*.partial"))


def test_mixed_precisions_are_bit_equal_too(tmp_path):
    """Like NVLM-D-72B, whose size shows that some of its tensors are fp32: bf16 values stored in a wider type."""
    shape = ("arch=decoder", "precision=bf16")
    held = write_release(tmp_path / "release", compose_config(*SMALL, *OPTIONS, *shape), 3, torch.bfloat16)
    wide = {name: t.float() if number % 3 == 0 else t for number, (name, t) in enumerate(held.items())}
    write_shards(tmp_path / "release", wide, 3)
    run_distributed(train_nothing, 1, (*shape, f"init.release={tmp_path / 'release'}"), tmp_path / "run")
    assert_same(tensors_in(exported(tmp_path / "run", tmp_path / "out", f"like={tmp_path / 'release'}")), wide)


def test_an_encoder_keeps_its_precision_and_gets_dummy_heads(tmp_path):
    """An fp32 encoder of five heads without dummy ones, in a bf16 run, gets three dummy heads."""
    shape = ("arch=decoder", "precision=bf16")
    config = compose_config(*SMALL, *OPTIONS, *shape)
    held = write_release(tmp_path / "release", config, dummy_heads=0, dtype=torch.float32)
    options = (*shape, f"init.release={tmp_path / 'release'}")
    run_distributed(train_nothing, 1, options, tmp_path / "run")
    moved = tmp_path / "moved"
    (tmp_path / "release").rename(moved)
    got = tensors_in(exported(tmp_path / "run", tmp_path / "out", f"vision={moved}"))
    expected = shapes(whole_model(config, internvit.parts(config.vision, 3)))
    assert {name: tuple(t.shape) for name, t in got.items()} == expected
    qkv, proj = (f"vision_model.encoder.layers.0.attn.{name}.weight" for name in ("qkv", "proj"))
    assert got[qkv].dtype == torch.float32
    for place, rows in enumerate(got[qkv].chunk(3)):
        assert torch.equal(rows[:30], held[qkv].chunk(3)[place]) and not rows[30:].any()
    assert torch.equal(got[proj][:, :30], held[proj]) and not got[proj][:, 30:].any()
    words = "language_model.model.embed_tokens.weight"
    assert torch.equal(got[words], held[words].bfloat16())


def test_config_json_is_in_the_form_of_the_release(tmp_path):
    """Full-size NVLM-D-72B: the entries of the published file, as known facts."""
    config = compose_config("arch=decoder", "llm=qwen2-72b", "dry_run=true")
    got = describe(config, internvit.exported(config.vision, 7))
    whole = dict(
        architectures=["NVLM_D"], model_type="NVLM_D", downsample_ratio=0.5, dynamic_image_size=True,
        force_image_size=448, min_dynamic_patch=1, max_dynamic_patch=6, ps_version="v2", select_layer=-1,
        template="chatml", use_thumbnail=True, use_backbone_lora=0, use_llm_lora=0, torch_dtype="bfloat16",
        transformers_version=None,
    )  # fmt: skip
    language = dict(
        architectures=["Qwen2ForCausalLM"], model_type="llama", hidden_size=8192, intermediate_size=29568,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-6,
        rope_theta=1e6, max_position_embeddings=32768, vocab_size=152064, attention_bias=True, mlp_bias=False,
        tie_word_embeddings=False, torch_dtype="bfloat16",
    )  # fmt: skip
    vision = dict(
        architectures=["InternVisionModel"], model_type="intern_vit_6b", hidden_size=3200, intermediate_size=12800,
        num_attention_heads=25, num_hidden_layers=45, image_size=448, patch_size=14, qk_normalization=True,
        qkv_bias=False, norm_type="rms_norm", layer_norm_eps=1e-6, initializer_factor=0.1, use_flash_attn=True,
    )  # fmt: skip
    assert got.items() >= whole.items()
    assert got["llm_config"].items() >= language.items()
    assert got["vision_config"].items() >= vision.items()
    assert got["auto_map"]["AutoModelForCausalLM"] == "modeling_nvlm_d.NVLM_D_Model"


def test_yi_and_nvlm_h_are_described_as_what_they_are():
    configs = (
        compose_config(f"arch={arch}", f"llm={llm}", "dry_run=true")
        for arch, llm in (("decoder", "yi-34b"), ("hybrid", "qwen2-72b"))
    )
    yi, hybrid = (describe(config, internvit.exported(config.vision, 7)) for config in configs)
    assert yi["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    assert yi["llm_config"]["attention_bias"] is False
    assert yi["nvlm"]["bos"] == "<|startoftext|>"
    assert hybrid["architectures"] == ["NVLM_H"] and "auto_map" not in hybrid


def test_the_release_has_the_published_names_and_shapes():
    config = compose_config("arch=decoder", "llm=qwen2-72b", "dry_run=true")
    whole = shapes(whole_model(config, internvit.parts(config.vision, 7)))
    assert sum(torch.Size(shape).numel() for shape in whole.values()) == 79_379_593_344
    layer = "vision_model.encoder.layers.44"
    assert whole[f"{layer}.attn.qkv.weight"] == (12288, 3200)
    assert whole[f"{layer}.attn.q_norm.weight"] == whole[f"{layer}.attn.k_norm.weight"] == (4096,)
    assert whole[f"{layer}.attn.proj.weight"] == (3200, 4096)
    assert whole["mlp1.1.weight"] == (29568, 12800) and whole["mlp1.3.weight"] == (8192, 29568)
    assert whole["language_model.model.layers.79.self_attn.k_proj.bias"] == (1024,)
    assert whole["language_model.lm_head.weight"] == (152064, 8192)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run to export, and to damage in copies."""
    folder = tmp_path_factory.mktemp("export")
    config = compose_config(*SMALL, *OPTIONS, "arch=hybrid", "precision=bf16")
    write_release(folder / "release", config, dummy_heads=3, dtype=torch.bfloat16)
    options = ("arch=hybrid", "precision=bf16", f"init.release={folder / 'release'}")
    run_distributed(train_nothing, 1, options, folder / "run")
    return folder / "run"


def data_file(run: Path) -> Path:
    """The largest file of the checkpoint."""
    return max(run.glob("checkpoints/step_*/*"), key=lambda file: file.stat().st_size)


def flip(path: Path) -> None:
    """Change one byte near the end."""
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


FAULTS = {
    "damaged tensors": (lambda run: flip(data_file(run)), r"\.distcp is not what was written"),
    "damaged metadata": (lambda run: flip(run / "checkpoints/step_00000001/.metadata"), "is not what was written"),
    "no tensors": (lambda run: data_file(run).unlink(), r"\.distcp is missing"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), "config.yaml: got no such file"),
    "another model": (
        lambda run: (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("layers: 4", "layers: 6", 1)
        ),
        r"no decoder.layers.4",
    ),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "a run folder with a checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path, run, fault, capsys):
    spoil, reason = FAULTS[fault]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    spoil(copy)
    with pytest.raises(ConfigError, match=reason):
        exported(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_refuses_in_one_line(tmp_path, run, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    other = tmp_path / "model.safetensors"
    save_file({"model.norm.weight": torch.ones(1)}, other)
    for words, reason in (
        ([f"checkpoint={run}"], "out: got nothing"),
        ([f"checkpoint={run}", f"out={tmp_path / 'there'}"], "which exists"),
        ([f"checkpoint={run}", f"out={tmp_path / 'o'}", "shards=5"], "shards: got a key that does not exist"),
        ([f"checkpoint={run}", f"out={tmp_path / 'o'}", "shard_gb=0"], "shard_gb: got 0"),
        ([f"checkpoint={run}", f"out={tmp_path / 'o'}", f"vision={tmp_path / 'no'}"], "vision: got"),
        ([f"checkpoint={tmp_path}", f"out={tmp_path / 'o'}"], "a run folder with a checkpoint"),
        ([f"checkpoint={run}", f"out={tmp_path / 'link'}"], "which exists"),
        ([f"checkpoint={run}", f"out={tmp_path / 'file' / 'o'}"], "Not a directory"),
        ([f"checkpoint={run}", f"out={tmp_path / 'o'}", f"tokenizer={tmp_path / 'no'}"], "tokenizer: got"),
        ([f"checkpoint={run}", f"out={tmp_path / 'o'}", f"like={other}"], "a folder in the exported layout"),
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and reason in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model.safetensors", "there"]


def test_a_tokenizer_s_file_gets_the_name_that_readers_look_for(tmp_path, run):
    file = tmp_path / "chatml-v2.json"
    shutil.copyfile(TINY, file)
    folder = exported(run, tmp_path / "out", f"tokenizer={file}")
    assert (folder / "tokenizer.json").read_bytes() == file.read_bytes() and not (folder / file.name).exists()


@pytest.mark.parametrize("fault", ["a width", "an epsilon", "the tokenizer"])
def test_what_its_reader_refuses_gets_no_name(tmp_path, run, fault, monkeypatch):
    """Whichever part of the export is wrong: its own code and init.release open it before it gets its name."""

    def wrong(config, encoder, text=None):
        values = describe(config, encoder, text)
        if fault == "a width":
            values["llm_config"]["intermediate_size"] += 1
        if fault == "an epsilon":  # which no tensor shows
            values["llm_config"]["rms_norm_eps"] = None
        return values

    monkeypatch.setattr("nvlm.export.layouts.nvlm.describe", wrong)
    if fault == "the tokenizer":
        monkeypatch.setattr(
            "nvlm.export.layouts.nvlm.exported_text", lambda config: Text({"tokenizer.json": "{}"}, 0, 0)
        )
    with pytest.raises(ConfigError, match="an export that its own reader refuses") as caught:
        exported(run, tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_command_says_what_cannot_load_the_folder(tmp_path, run, capsys):
    assert main([f"checkpoint={run}", f"out={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    reason = "NVLM-H is known to no other library: no published model has it"
    assert f"wrote {tmp_path / 'out'}\nnote: only its own modeling_nvlm.py can load it: {reason}\n" in told
    assert f"- {reason}." in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2]


def killed_midway(run: Path, out: Path) -> None:
    """An export that is killed after its tenth tensor."""
    write, count = ShardWriter.write, itertools.count()

    def kill(writer, name, tensor):
        if next(count) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        write(writer, name, tensor)

    ShardWriter.write = kill
    exported(run, out)


def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path, run):
    process = multiprocessing.get_context("fork").Process(target=killed_midway, args=(run, tmp_path / "out"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert not (tmp_path / ".out.partial" / "model.safetensors.index.json").exists()
    assert not (tmp_path / ".out.partial" / "config.json").exists()
    exported(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_and_is_said(tmp_path, run):
    """A real limit on file sizes, in a separate process."""

    def limited(pipe) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            exported(run, tmp_path / "out")
        except ConfigError as error:
            pipe.send(str(error))

    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=limited, args=(sending,))
    process.start()
    process.join(60)
    assert receiving.poll() and "File too large" in receiving.recv()
    assert not list(tmp_path.iterdir())
