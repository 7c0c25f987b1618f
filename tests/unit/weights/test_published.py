"""Wrong folders are refused by name, from their headers, before anything is read or written."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.export.describe import describe
from nvlm.inputs.check import check_weights
from nvlm.inputs.sources import model_source
from nvlm.inputs.whole import check_whole
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.source import vision_source
from nvlm.weights import defaults
from nvlm.weights.described import check_language
from tests.published import LANGUAGES, SMALL, encoder_model, internvit_names, language_model, write_release

ROOT = Path(__file__).resolve().parents[3]
TINY_VISION = [word for word in SMALL if not word.startswith("vision.")]  # with the package's own encoder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A language model's folder in several files."""
    folder = tmp_path_factory.mktemp("qwen")
    language_model(compose_config(*SMALL)).save_pretrained(folder, max_shard_size="20KB")
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change(file: Path, how: Callable[[dict], None]) -> None:
    """Rewrite a safetensors file."""
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit(file: Path, **values) -> None:
    """Set entries of a JSON file; None removes them."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 40)


def as_pickle(folder: Path) -> None:
    for file in [*files_of(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def shorter(tensors: dict) -> None:
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name][:-1].clone()


def as_ints(tensors: dict) -> None:
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)


def with_up(folder: Path) -> Path:
    """A file that contains an up projection."""
    return next(file for file in files_of(folder) if any("up_proj" in name for name in load_file(file)))


def index_more(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.layers.4.mlp.up_proj.weight": files_of(folder)[0].name})


def index_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.norm.weight": "../elsewhere/model.safetensors"})


def index_less(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={k: v for k, v in weight_map.items() if k != "model.layers.0.mlp.up_proj.weight"})


def config_of(folder: Path, **values) -> None:
    edit(folder / "config.json", **values)


def lead_nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("pruned")


def alone_and_nowhere(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "model.safetensors").symlink_to("pruned")


FAULTS = {
    "a missing file": (lambda f: files_of(f)[2].unlink(), r"no model-00003-of-\d+.safetensors"),
    "a truncated file": (lambda f: truncate(files_of(f)[1]), r"model-00002-of-.*a damaged file"),
    "a file cut in its header": (lambda f: os.truncate(files_of(f)[1], 30), r"model-00002-of-.*a damaged file"),
    "an empty file": (lambda f: os.truncate(files_of(f)[1], 0), r"model-00002-of-.*a damaged file"),
    "a wrong shape": (lambda f: change(with_up(f), shorter), r"up_proj.weight of shape \(39, 24\) instead of \(40"),
    "a wrong dtype": (lambda f: change(with_up(f), as_ints), r"up_proj.weight of dtype I8 instead of F32, F16, BF16"),
    "an index that names what no file holds": (index_more, r"model.layers.4.mlp.up_proj.weight listed in model-00001"),
    "an index that leaves out what a file holds": (index_less, r"no model.layers.0.mlp.up_proj.weight"),
    "an index that leads elsewhere": (index_outside, "a damaged index"),
    "a broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "a damaged index"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "without model.safetensors.index.json"),
    "a pickle": (as_pickle, "pytorch_model.bin, a pickle, which could run any code"),
    "a pickle under another name": (
        lambda f: torch.save({}, files_of(f)[1]),
        r"model-00002-of-.*a pickle, which could run any code",
    ),
    "remote code": (
        lambda f: config_of(f, auto_map={"AutoModelForCausalLM": "modeling_x.Model"}),
        "config.json: got auto_map asks for remote code: modeling_x.Model",
    ),
    "remote code from elsewhere": (lambda f: config_of(f, auto_map="someone/repo--m.M"), "remote code: someone/repo"),
    "a broken config.json": (lambda f: (f / "config.json").write_text("{"), "config.json: got a damaged file"),
    "another architecture": (lambda f: config_of(f, architectures=["GPT2LMHeadModel"]), r"\['GPT2LMHeadModel'\]"),
    "another epsilon": (lambda f: config_of(f, rms_norm_eps=1e-6), "rms_norm_eps: got 1e-06, expected llm.norm_eps="),
    "another rotary base": (
        lambda f: config_of(f, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        r"rope_theta: got 1000000.0, expected llm.rope_theta=5000.0. Fix: llm.rope_theta=1000000.0",
    ),
    "another rotary base, older form": (
        lambda f: config_of(f, rope_parameters=None, rope_theta=1e6),
        r"rope_theta: got 1000000.0",
    ),
    "rotary scaling that is not built": (
        lambda f: config_of(f, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling: got 'yarn'",
    ),
    "rotary scaling without its numbers": (
        lambda f: config_of(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling: got .*, expected factor, low_freq_factor",
    ),
    "rotary scaling that is a list": (lambda f: config_of(f, rope_scaling=[8.0]), r"rope_scaling: got \[8.0\]"),
    "a file that leads nowhere": (lambda f: lead_nowhere(files_of(f)[1]), r"no model-00002-of-"),
    "one file that leads nowhere": (alone_and_nowhere, "model.safetensors: got No such file or directory"),
    "a sliding window": (lambda f: config_of(f, use_sliding_window=True), "use_sliding_window: got true"),
    "other heads": (lambda f: config_of(f, num_attention_heads=2), "num_attention_heads: got 2"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_right_is_refused_by_name(tmp_path, qwen, fault):
    spoil, reason = FAULTS[fault]
    folder = tmp_path / "folder"
    shutil.copytree(qwen, folder)
    config = compose_config(*SMALL, f"init.llm={folder}")
    assert model_source(config).parts.keys() == {"llm"}
    spoil(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        model_source(config)
    assert "\n" not in str(caught.value) and "Fix: " in str(caught.value)


def test_dynamic_rotary_scaling_changes_nothing_within_the_trained_positions(tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "folder")
    config_of(tmp_path / "folder", rope_scaling={"type": "dynamic", "factor": 3.0})
    within = (*SMALL, "llm.max_positions=512", f"init.llm={tmp_path / 'folder'}")
    assert model_source(compose_config(*within))
    with pytest.raises(ConfigError, match="dynamic with llm.max_positions=513, expected at most 512 positions"):
        model_source(compose_config(*within, "llm.max_positions=513"))


def test_the_defaults_are_those_of_the_installed_classes():
    for architecture, table in defaults.LANGUAGES.items():
        config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
        own = config.to_dict() | {"rope_theta": config.rope_parameters["rope_theta"]}
        own["num_key_value_heads"] = inspect.signature(type(config)).parameters["num_key_value_heads"].default
        assert {name: own[name] for name in table} == table
        shown = {name for name, kind in own.items() if name not in table and isinstance(kind, (int, float, str))}
        assert shown <= HARMLESS, shown - HARMLESS  # what a new version adds is looked at


# Of training, loading or text, or derived from other entries; sliding_window counts with use_sliding_window alone.
HARMLESS = set(
    """_name_or_path attention_dropout bos_token_id eos_token_id pad_token_id head_dim initializer_range use_cache
    model_type transformers_version chunk_size_feed_forward is_encoder_decoder output_attentions output_hidden_states
    return_dict pretraining_tp problem_type max_window_layers sliding_window dtype""".split()
)


# Entries of a Qwen2, the setting that each is compared with, and what it is where the file leaves it out.
LEFT_OUT = {
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
    "vocab_size": ("vocab", 151936),
    "rope_theta": ("rope_theta", 1e4),
    "head_dim": ("head_dim", 6),  # hidden_size / num_attention_heads
    "intermediate_size": ("ffn", 22016),
    "num_hidden_layers": ("layers", 32),
    "num_key_value_heads": ("kv_heads", 32),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_language_model_s_file_leaves_out_means_the_default(qwen, name):
    """Never the run's own value, which would silently change the results."""
    values = json.loads((qwen / "config.json").read_text())
    given = values.pop("rope_parameters")
    values["rope_theta"] = given["rope_theta"]
    language = compose_config(*SMALL).llm
    check_language(values, language, "init.llm")
    setting, value = LEFT_OUT[name]
    for absent in ({k: v for k, v in values.items() if k != name}, values | {name: None}):
        check_language(absent, replace(language, **{setting: value}), "init.llm")
        with pytest.raises(ConfigError, match=f"{name}: got nothing, which means {value}, expected llm.{setting}="):
            check_language(absent, replace(language, **{setting: value + 1}), "init.llm")


def test_llama_s_defaults_are_its_own():
    values = dict(architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=8, num_hidden_layers=2)
    language = replace(
        compose_config(*SMALL).llm, hidden=64, heads=8, kv_heads=8, head_dim=8, layers=2, vocab=32000, ffn=11008,
        norm_eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    check_language(values, language, "init.llm")
    with pytest.raises(ConfigError, match="num_key_value_heads: got nothing, which means 8, expected llm.kv_heads=2"):
        check_language(values, replace(language, kv_heads=2), "init.llm")
    with pytest.raises(ConfigError, match="attention_bias: got true, expected false: no other is supported"):
        check_language(values | {"attention_bias": True}, language, "init.llm")
    with pytest.raises(ConfigError, match="architectures: got None"):
        check_language({"hidden_size": 64}, language, "init.llm")
    check_language({**values, "architectures": None, "model_type": "llama"}, language, "init.llm")


def test_norms_of_heads_are_qwen3_s(qwen):
    values, language = json.loads((qwen / "config.json").read_text()), compose_config(*SMALL).llm
    normed, qwen3 = replace(language, qk_norm=True, qkv_bias=False), values | {"architectures": ["Qwen3ForCausalLM"]}
    check_language(qwen3, normed, "init.llm")
    with pytest.raises(ConfigError, match="attention_bias: got True, expected llm.qkv_bias=False"):
        check_language(qwen3 | {"attention_bias": True}, normed, "init.llm")
    with pytest.raises(ConfigError, match="got Qwen3ForCausalLM, expected a model with llm.qk_norm=false. Fix: llm.qk"):
        check_language(qwen3, language, "init.llm")
    with pytest.raises(ConfigError, match="got Qwen2ForCausalLM, expected a model with llm.qk_norm=true. Fix: llm.qk"):
        check_language(values, normed, "init.llm")


def test_a_sliding_window_changes_nothing_up_to_its_length(qwen):
    values = json.loads((qwen / "config.json").read_text()) | {"architectures": ["MistralForCausalLM"]}
    language, _ = compose_config(*SMALL, "llm.max_positions=4097").llm, values.pop("sliding_window")
    check_language(values | {"sliding_window": None}, language, "init.llm")
    for given in ({}, {"sliding_window": 4096}):
        check_language(values | given, replace(language, max_positions=4096), "init.llm")
        with pytest.raises(ConfigError, match="sliding_window: got 4096 with llm.max_positions=4097"):
            check_language(values | given, language, "init.llm")


def test_interpolation_is_the_file_s_or_is_learned_by_a_model_without(qwen):
    values, language = json.loads((qwen / "config.json").read_text()), compose_config(*SMALL).llm
    check_language(values, replace(language, rope_interpolation=2.0), "init.llm")
    linear = values | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}
    check_language(linear, replace(language, rope_interpolation=4.0), "init.llm")
    with pytest.raises(
        ConfigError, match="got linear by 4, expected llm.rope_interpolation=2. Fix: llm.rope_inter.*=4"
    ):
        check_language(linear, replace(language, rope_interpolation=2.0), "init.llm")
    linear["rope_parameters"].pop("factor")
    with pytest.raises(ConfigError, match="expected a factor"):
        check_language(linear, language, "init.llm")


@pytest.mark.parametrize("name", defaults.FIXED_LANGUAGE)
def test_what_changes_numbers_and_is_not_built_is_refused_by_name(qwen, name):
    values, language = json.loads((qwen / "config.json").read_text()), compose_config(*SMALL).llm
    fixed = defaults.FIXED_LANGUAGE[name]
    check_language(values | {name: fixed}, language, "init.llm")
    other = not fixed if isinstance(fixed, bool) else "gelu" if isinstance(fixed, str) else 0.5
    with pytest.raises(ConfigError, match=f"config.json: {name}: got .*Fix: use another model") as caught:
        check_language(values | {name: other}, language, "init.llm")
    assert "\n" not in str(caught.value)


def test_rotary_entries_that_contradict_each_other_or_differ_by_layer_are_refused(qwen):
    values, language = json.loads((qwen / "config.json").read_text()), compose_config(*SMALL).llm
    nested = {"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 10.0}}
    for change, reason in (
        ({"rope_theta": 1e4}, "rope_theta: got 5000.0 and 10000.0, expected one value"),
        ({"rope_parameters": nested}, "expected one rotary embedding for all layers"),
        ({"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_language(values | change, language, "init.llm")


def test_what_an_encoder_s_file_leaves_out_means_internvits_default():
    vision = compose_config("vision=internvit-6b", "llm=qwen2-72b", "dry_run=true").vision
    values = dict(num_hidden_layers=45, image_size=448)
    internvit.check_config(values, vision, "init.vision")
    small = compose_config("vision=internvit-300m", "llm=qwen2-72b", "dry_run=true").vision
    whole = dict(image_size=448, num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096,
                 qkv_bias=True, qk_normalization=False, norm_type="layer_norm")  # fmt: skip
    internvit.check_config(whole, small, "init.vision")
    for name in whole:
        with pytest.raises(ConfigError, match=f"config.json: {name}: got nothing, which means"):
            internvit.check_config({k: v for k, v in whole.items() if k != name}, small, "init.vision")
    with pytest.raises(ConfigError, match="norm_type: got batch_norm"):
        internvit.check_config(values | {"norm_type": "batch_norm"}, vision, "init.vision")
    with pytest.raises(ConfigError, match='hidden_act: got "quick_gelu", expected "gelu"'):
        internvit.check_config(values | {"hidden_act": "quick_gelu"}, vision, "init.vision")
    with pytest.raises(ConfigError, match="Fix: vision.norm=layer$"):
        internvit.check_config(values | {"norm_type": "layer_norm"}, vision, "init.vision")


def test_what_a_release_s_file_leaves_out_means_internvl_s_default():
    config = compose_config("arch=decoder", "llm=qwen2-72b", "dry_run=true")
    values = describe(config, internvit.exported(config.vision, 7))
    check_whole(values, config, "init.release")
    check_whole({k: v for k, v in values.items() if k not in ("select_layer", "downsample_ratio")}, config, "r")
    for change, reason in (
        ({"ps_version": None}, 'ps_version: got "v1", expected "v2"'),
        ({"select_layer": -2}, "select_layer: got -2"),
        ({"downsample_ratio": 0.25}, "got 0.25, expected vision.downsample=2. Fix: vision.downsample=4"),
        ({"llm_config": values["llm_config"] | {"rope_theta": None}}, "rope_theta: got nothing, which means 10000.0"),
        ({"vision_config": values["vision_config"] | {"image_size": None}}, "image_size: got nothing"),
        ({"llm_config": {}}, "architectures: got None"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_whole(values | change, config, "init.release")


def test_llama_scaling_must_be_the_run_s(tmp_path):
    language_model(compose_config(*SMALL, *LANGUAGES["llama-3.1"])).save_pretrained(tmp_path)
    config = compose_config(*SMALL, *LANGUAGES["yi"], f"init.llm={tmp_path}")
    with pytest.raises(ConfigError, match="rope_scaling") as caught:
        model_source(config)
    fix = str(caught.value).partition("Fix: ")[2].strip("'")
    assert model_source(compose_config(*SMALL, *LANGUAGES["yi"], f"init.llm={tmp_path}", fix))


def test_missing_and_surplus_tensors_are_named(tmp_path, qwen):
    for option, reason in (
        ("llm.layers=5", "no model.layers.4.input_layernorm.weight"),
        ("llm.layers=3", "model.layers.3.input_layernorm.weight, which the model does not have"),
        ("llm.qkv_bias=false", "self_attn.k_proj.bias, which the model does not have"),
    ):
        edited = tmp_path / option.replace("=", "-")
        shutil.copytree(qwen, edited)
        (edited / "config.json").unlink()
        with pytest.raises(ConfigError, match=reason):
            model_source(compose_config(*SMALL, option, f"init.llm={edited}"))


def test_a_tied_model_may_hold_its_output_layer_all_the_same(tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "folder")
    config_of(tmp_path / "folder", tie_word_embeddings=True)
    assert model_source(compose_config(*SMALL, "llm.tied=true", f"init.llm={tmp_path / 'folder'}"))


def test_what_the_stage_does_not_declare_new_must_be_read(qwen):
    for options, lost in (
        (("arch=hybrid", "llm.cross_every=2", "stage.new=[projector]"), "xattn"),
        (("arch=hybrid", "llm.cross_every=2", "stage.new=[]"), "projector, xattn"),
        (("arch=decoder", "stage.new=[]"), "projector"),
    ):
        with pytest.raises(ConfigError, match=f"weights of {lost}: got none in init.llm"):
            model_source(compose_config(*SMALL, *options, f"init.llm={qwen}"))
    assert model_source(compose_config(*SMALL, "arch=hybrid", "llm.cross_every=2", f"init.llm={qwen}"))


def test_encoders(tmp_path):
    config = compose_config(*SMALL)
    names = internvit_names(encoder_model(config).state_dict(), config.vision.layers)
    save_file(names, tmp_path / "model.safetensors")
    values = dict(
        architectures=["InternVisionModel"], hidden_size=30, num_hidden_layers=2, num_attention_heads=5,
        intermediate_size=44, image_size=56, patch_size=14, layer_norm_eps=1e-6, qk_normalization=True,
        qkv_bias=False, auto_map={"AutoModel": "modeling_intern_vit.InternVisionModel"},
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    one = f"init.vision={tmp_path / 'model.safetensors'}"
    assert vision_source(compose_config(*SMALL, one)).parts.keys() == {"vision"}
    assert vision_source(compose_config(*SMALL, f"init.vision={tmp_path}"))
    for option, reason in (
        ("vision.heads=3", "num_attention_heads: got 5, expected vision.heads=3"),
        ("vision.norm_eps=1e-5", "layer_norm_eps: got 1e-06"),
        ("vision.qk_norm=false", "qk_normalization: got True"),
        ("vision.layers=3", "num_hidden_layers: got 2"),
    ):
        with pytest.raises(ConfigError, match=reason):
            vision_source(compose_config(*SMALL, option, f"init.vision={tmp_path}"))
    edit(tmp_path / "config.json", auto_map={"AutoModel": "someone/else--modeling_intern_vit.InternVisionModel"})
    with pytest.raises(ConfigError, match="remote code: someone/else"):
        vision_source(compose_config(*SMALL, f"init.vision={tmp_path}"))


def test_a_release_gives_what_it_holds(tmp_path):
    decoder = ("arch=decoder", "init.vision=null", f"init.release={tmp_path / 'd'}")
    hybrid = ("arch=hybrid", "llm.cross_every=2", "init.vision=null", f"init.release={tmp_path / 'd'}")
    write_release(tmp_path / "d", compose_config(*SMALL), dummy_heads=3, dtype=torch.bfloat16)
    assert model_source(compose_config(*SMALL, *decoder)).parts.keys() == {"vision", "projector", "llm"}
    assert model_source(compose_config(*SMALL, *hybrid)).parts.keys() == {"vision", "projector", "llm"}
    with pytest.raises(ConfigError, match="weights of xattn: got none in init.release"):
        model_source(compose_config(*SMALL, *hybrid, "stage.new=[]"))
    with pytest.raises(ConfigError, match=r"mlp1.1.weight of shape \(40, 120\) instead of \(24, 120\)"):
        model_source(compose_config(*SMALL, *hybrid, "arch=xattn"))
    encoder_alone = compose_config(*SMALL, f"init.vision={tmp_path / 'd'}")
    assert all(name.startswith("vision_model.") for name in vision_source(encoder_alone).stored)


@pytest.mark.parametrize(("written", "binding"), [(True, "mean"), (False, "none"), ("ordered", "ordered")])
def test_an_exported_nvlm_h_says_how_its_tags_are_bound(tmp_path, written, binding):
    """Earlier versions wrote true or false."""
    options = (*SMALL, "arch=hybrid", "llm.cross_every=2", "init.vision=null", f"init.release={tmp_path / 'h'}")
    config = compose_config(*options, f"arch.bind_tags={binding}")
    write_release(tmp_path / "h", config, dummy_heads=0, dtype=torch.float32)
    values = describe(config, internvit.exported(config.vision, 0))
    values["nvlm"]["bind_tags"] = written
    (tmp_path / "h" / "config.json").write_text(json.dumps(values))
    assert "xattn" in model_source(config).parts
    other = compose_config(*options, "arch.bind_tags=" + ("none" if binding == "mean" else "mean"))
    with pytest.raises(ConfigError, match=f"bind_tags: got .*Fix: arch.bind_tags={binding}$"):
        model_source(other)


def test_one_source_for_each_part(tmp_path, qwen):
    for options, reason in (
        ((f"init.llm={qwen}", "init.checkpoint=runs/a"), "init.llm and init.checkpoint"),
        ((f"init.release={qwen}",), "init.release and init.vision"),
    ):
        with pytest.raises(ConfigError, match=reason):
            compose_config(*SMALL, *options)


def test_a_checkpoint_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="init.checkpoint: got 'runs/nothing'"):
        check_weights(compose_config(*TINY_VISION, "init.checkpoint=runs/nothing"))


def test_the_command_refuses_before_it_writes_and_without_torch(tmp_path, qwen):
    """The real command: one line, status 2, no run folder; and the check itself imports no torch."""
    shutil.copytree(qwen, tmp_path / "folder")
    truncate(files_of(tmp_path / "folder")[0])
    words = [*TINY_VISION, f"init.llm={tmp_path / 'folder'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: init.llm: ") and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    code = (
        "import sys; from nvlm.commands.compose import compose_config; from nvlm.inputs.sources import model_source\n"
        f"model_source(compose_config(*{SMALL!r}, 'init.llm={qwen}')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
