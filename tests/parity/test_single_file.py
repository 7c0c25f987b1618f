"""The modelling file in exported folders compared with the trainer's own classes and preprocessing.

Both compute in fp32 from the same weights; a logit may differ by 1e-5 of the largest one (worst seen 1e-6).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.pipeline import build_parts
from nvlm.arch.registry import placement_rule
from nvlm.config.values import Config
from nvlm.data.batch import IMAGE
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.data.text.tokenizer import TINY, load_tokenizer
from nvlm.export.describe import describe
from nvlm.export.readback import check_readable
from nvlm.inputs.sources import whole_model
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import VisionPath, solo_groups
from nvlm.weights.parts import published
from nvlm.weights.published import VISION
from tests.models import TILE, Story, record_of, small_config
from tests.published import scatter
from tests.stories import ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO

SOURCE = Path(__file__).parents[2] / "nvlm" / "export" / "modeling_nvlm.py"
TOLERANCE = 1e-5
SAYING = Story("saying", (("system", "Be <|im_end|> brief."), *TWO.turns), TWO.grids)

# The language model of Llama 3.1 and the encoder of 300M parameters: other rotary angles, norms and biases.
SCALING = dict(factor=4, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
LLAMA3 = "llm.rope_scaling={" + ",".join(f"{key}:{value}" for key, value in SCALING.items()) + "}"
SMALL_ENCODER = ("vision.norm=layer", "vision.qk_norm=false", "vision.qkv_bias=true")

CASES = {
    "decoder": ("arch=decoder",),
    "decoder-llama": ("arch=decoder", "llm.qkv_bias=false", "tiling.tag=2d_grid", "data.system=Look."),
    "decoder-tied": ("arch=decoder", "llm.tied=true", "tiling.tag=2d_bbox"),
    "decoder-no-tag": ("arch=decoder", "tiling.tag=none", "llm.kv_heads=1"),
    "xattn": ("arch=xattn",),
    "xattn-llama": ("arch=xattn", "llm.qkv_bias=false", "tiling.tag=2d_bbox", "arch.cross_every=1"),
    "xattn-tied": ("arch=xattn", "llm.tied=true", "tiling.tag=2d_grid", "tiling.max_tiles=12"),
    "xattn-no-tag": ("arch=xattn", "tiling.tag=none"),
    "hybrid": ("arch=hybrid",),
    "hybrid-llama": ("arch=hybrid", "llm.qkv_bias=false", "tiling.tag=2d_bbox", "data.system=Look."),
    "hybrid-tied": ("arch=hybrid", "llm.tied=true", "tiling.tag=2d_grid", "arch.cross_every=5"),
    "hybrid-no-tag": ("arch=hybrid", "tiling.tag=none"),
    "decoder-llama-3.1": ("arch=decoder", "llm.qkv_bias=false", LLAMA3),
    "decoder-qwen3": ("arch=decoder", "llm.qkv_bias=false", "llm.qk_norm=true", "llm.rope_interpolation=2"),
    "xattn-300m": ("arch=xattn", *SMALL_ENCODER),
    "hybrid-300m": ("arch=hybrid", *SMALL_ENCODER, LLAMA3),
    "decoder-downsample-4": ("arch=decoder", "vision.downsample=4", "tiling.max_tiles=9"),
    "hybrid-downsample-1": ("arch=hybrid", "vision.downsample=1", "data.seq_length=999", "data.cross_length=2000"),
    "xattn-padded": ("arch=xattn", "llm.vocab_multiple=64", "llm.norm_eps=1e-4", "vision.norm_eps=1e-4"),
    "xattn-latest": ("arch=xattn", "arch.sees=latest"),
    "hybrid-latest": ("arch=hybrid", "arch.sees=latest"),
    "hybrid-unbound": ("arch=hybrid", "arch.bind_tags=none", "tiling.max_tiles=12"),
}
STORIES = (ONE, ONE_TILE, TWO, SIDE_BY_SIDE, TEXT, SAYING)


@pytest.fixture(scope="module", autouse=True)
def clean(megatron: None) -> Iterator[None]:
    """Objects built once for all tests here end with their process groups."""
    yield
    built_of.cache_clear()


@dataclass(frozen=True)
class Trained:
    """The trainer's model and encoder."""

    config: Config
    model: VisionLanguageModel
    vision: VisionPath

    @property
    def encoder(self) -> InternViT:
        return self.vision.encoder


@cache
def built_of(*overrides: str) -> Trained:
    return trainer_model(*overrides)


# --- an exported folder, written out once more ---


def trainer_model(*overrides: str) -> Trained:
    """The trainer's classes with random weights: gates open, norm weights and biases not at their initial values."""
    config = small_config(*overrides)
    (model,), encoder = build_parts(config), InternViT(config, solo_groups())
    for seed, module in enumerate((model, encoder)):
        scatter(module, seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            parameter.data.fill_(0.7)
    return Trained(config, model, VisionPath(encoder, config.vision))


def tensors_of(trained: Trained, dummy_heads: int = 0) -> dict[str, Tensor]:
    """All tensors under their exported names, with zeros in the dummy heads."""
    parts = internvit.parts(trained.config.vision, dummy_heads)
    tower = published(parts, dict(trained.encoder.named_parameters()))
    others = [part for part in whole_model(trained.config, parts) if not part.name.startswith(VISION)]
    ours = published(others, dict(trained.model.named_parameters()))
    return {VISION + name: tensor for name, tensor in tower.items()} | ours


def write_folder(folder: Path, trained: Trained, dummy_heads: int = 0) -> Path:
    """Write a folder like an export's."""
    shutil.copy(SOURCE, folder)
    shutil.copy(TINY, folder / "tokenizer.json")
    encoder = internvit.exported(trained.config.vision, dummy_heads)
    (folder / "config.json").write_text(json.dumps(describe(trained.config, encoder)))
    save_file(tensors_of(trained, dummy_heads), folder / "model.safetensors")
    return folder


def module_of(folder: Path) -> ModuleType:
    """The copied file, imported from its path."""
    spec = importlib.util.spec_from_file_location("modeling_nvlm_copy", folder / "modeling_nvlm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loaded(folder: Path):
    """The folder's model in fp32."""
    return module_of(folder).NVLM.from_folder(folder, dtype=torch.float32)


@pytest.fixture(params=CASES.values(), ids=CASES)
def pair(request, tmp_path):
    """(the trainer's classes, the exported model); in some cases with dummy heads in the encoder."""
    built = built_of(*request.param)
    folder = write_folder(tmp_path, built, dummy_heads=2 if "tied" in request.node.name else 0)
    check_readable(folder, built.config, folder)
    return built, loaded(folder)


# --- both ways ---


@dataclass(frozen=True)
class Expected:
    """The trainer's results for a record: ids of the stream and of the keys, tiles, logits [S, V]."""

    stream: list[int]
    keys: list[int]
    pixels: Tensor
    logits_SV: Tensor


@torch.no_grad()
def expected_of(record: Record, trained: Trained) -> Expected:
    """Results from the trainer's own preprocessing and classes."""
    config, model = trained.config, trained.model
    sample = encode(record, build_processor(config, placement_rule(config.arch.name)))
    batch = trained.vision.encode(collate([[sample]], TILE))
    logits_SV = model.logits(model.hidden(batch))[: len(sample.tokens), 0, : config.llm.vocab].float()
    return Expected(sample.tokens.tolist(), sample.cross_tokens.tolist(), sample.pixels, logits_SV)


def ids_of(pieces: Sequence, tile_tokens: int) -> list[int]:
    """Flat ids, with IMAGE instead of tile tokens."""
    return [i for piece in pieces for i in (piece.ids if piece.ids is not None else [IMAGE] * tile_tokens)]


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_alike(record: Record, built: Trained, model) -> None:
    expected, inputs = expected_of(record, built), model.inputs(record.messages, record.images)
    assert ids_of(inputs.stream, model.tile_tokens) == expected.stream
    assert ids_of(inputs.keys, model.tile_tokens) == expected.keys
    assert torch.equal(inputs.pixels, expected.pixels)
    assert gap(model.logits(inputs), expected.logits_SV) < TOLERANCE


def test_it_lays_out_and_computes_as_the_trainer(pair):
    built, model = pair
    for story in STORIES:
        assert_alike(record_of(story), built, model)


def test_it_speaks_llama_3_as_the_trainer_does(tmp_path):
    """Whose messages lose white space at their ends; special tokens in them stay text."""
    values, names = json.loads(TINY.read_text()), load_tokenizer("tiny").vocab
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    values["added_tokens"] += [{"id": names + n, "content": name, **flags} for n, name in enumerate(tokens)]
    (tmp_path / "llama3").mkdir()
    file = tmp_path / "llama3" / "tokenizer.json"
    file.write_text(json.dumps(values))
    chosen = (f"llm.tokenizer={file}", "llm.chat=llama3", "llm.bos='<|begin_of_text|>'", "data.system=' Look. '")
    built = built_of("arch=hybrid", *chosen)
    (tmp_path / "out").mkdir()
    folder = write_folder(tmp_path / "out", built)
    shutil.copy(file, folder / "tokenizer.json")
    model = loaded(folder)
    said = Story("said", (("user", " <image>What?\n"), ("assistant", "\n<|eot_id|> It <image> \n")), TWO.grids[:2])
    for story in (*STORIES, said):
        assert_alike(record_of(story), built, model)
    asked = record_of(replace(said, turns=said.turns[:1], grids=said.grids[:1]))
    ids = ids_of(model.inputs(asked.messages, asked.images, reply=True).stream, model.tile_tokens)
    header = [names + 1, *model.encode("assistant"), names + 2, *model.encode("\n\n")]
    assert ids[-len(header) - 1 :] == [names + 3, *header] and names + 3 in model.ends


def pictures() -> dict[str, Image.Image]:
    """Images of every grid and of unusual modes that must be resized."""
    generator = np.random.default_rng(7)

    def photo(width: int, height: int) -> Image.Image:
        coarse = generator.integers(256, size=(5, 7, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    sizes = [(640, 480), (31, 97), (1200, 100), (9, 9), (80, 80), (100, 40), (7, 60), (333, 200), (3, 2)]
    found = {f"{width}x{height}": photo(width, height) for width, height in sizes}
    found |= {mode: photo(90, 50).convert(mode) for mode in ("L", "RGBA", "LA", "CMYK", "P", "1")}
    found["transparent"] = photo(40, 30).quantize(16)
    found["transparent"].info["transparency"] = 3
    found["grey16"] = Image.fromarray(generator.integers(65536, size=(30, 44), dtype=np.uint16))
    found["integers"] = Image.fromarray(generator.integers(200, size=(30, 44), dtype=np.int32))
    found["floats"] = Image.fromarray(generator.random((30, 44), dtype=np.float32))
    return found


@pytest.mark.parametrize("overrides", [("arch=decoder",), ("arch=hybrid", "tiling.max_tiles=12")], ids=["6", "12"])
def test_real_pictures_become_the_same_tiles(overrides, tmp_path):
    config = small_config(*overrides)
    built = built_of(*overrides)
    model = loaded(write_folder(tmp_path, built))
    shapes = set()
    for name, picture in pictures().items():
        record = Record(name, [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "7"}], [picture])
        assert_alike(record, built, model)
        shapes.add(len(expected_of(record, built).pixels))
    assert len(shapes) >= 4 and max(shapes) > 5, shapes
    assert config.tiling.resize == "exact"


def test_a_picture_is_read_from_its_file(tmp_path):
    built = built_of("arch=xattn")
    model = loaded(write_folder(tmp_path, built))
    pictures()["P"].save(tmp_path / "picture.png")
    messages = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "7"}]
    expected = expected_of(Record("file", messages, [tmp_path / "picture.png"]), built)
    path = tmp_path / "picture.png"
    for source in (path, str(path), path.read_bytes()):
        assert torch.equal(model.inputs(messages, [source]).pixels, expected.pixels)


def test_fewer_tiles_as_in_a_sequence_without_room(tmp_path):
    built = built_of("arch=xattn")
    model = loaded(write_folder(tmp_path, built))
    record = record_of(TWO)
    full = expected_of(record, built)
    config = replace(built.config, data=replace(built.config.data, cross_length=len(full.keys) - 1))
    tight = expected_of(record, replace(built, config=config))
    inputs = model.inputs(record.messages, record.images, max_tiles=2)
    assert len(tight.pixels) < len(full.pixels) and torch.equal(inputs.pixels, tight.pixels)
    assert gap(model.logits(inputs), tight.logits_SV) < TOLERANCE


# --- answering ---


def greedy(module: ModuleType, model, messages, images, tokens: int) -> list[int]:
    """Tokens one by one, each from the logits of all tokens before it."""
    inputs, ids = model.inputs(messages, images, reply=True), []
    while len(ids) < tokens and ids[-1:] != [model.tokenizer.token_to_id("<|im_end|>")]:
        ids.append(int(model.logits(inputs)[-1].argmax()))
        inputs.stream.append(module.Piece((ids[-1],), len(images) - 1))
    return ids


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_answer_is_the_greedy_loop(arch, tmp_path):
    model = loaded(write_folder(tmp_path, built_of(f"arch={arch}")))
    module, seen, said = sys.modules[type(model).__module__], [], set()
    end, decode = model.tokenizer.token_to_id("<|im_end|>"), model.tokenizer.decode
    model.__dict__["tokenizer"] = Spy(model.tokenizer, lambda ids, **_: seen.append(list(ids)) or decode(ids))
    for story in (ONE, ONE_TILE, SIDE_BY_SIDE, TEXT):
        record = record_of(story)
        expected = greedy(module, model, record.messages, record.images, 8)
        assert model.answer(record.messages, record.images, max_new_tokens=8) == decode(expected)
        assert seen.pop() == expected and len(expected) == 8
        said |= set(expected)
    assert len(said) > 4  # a cache that lost something would show
    for named in (expected[3], [0, expected[3]]):  # a token that generation_config.json names ends it, too
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        del model.__dict__["ends"]
        model.answer(record.messages, record.images, max_new_tokens=30)
        assert seen.pop() == expected[: expected.index(expected[3])]
    with torch.no_grad():  # now the turn's end wins where the last token did
        model.language_model.lm_head.weight[end] = 1.5 * model.language_model.lm_head.weight[expected[-1]]
    ended = greedy(module, model, record.messages, record.images, 30)
    model.answer(record.messages, record.images, max_new_tokens=30)
    assert seen.pop() == ended[:-1] and ended[-1] == end and len(ended) <= 8


class Spy:
    """A tokenizer with another `decode`."""

    def __init__(self, tokenizer, decode) -> None:
        self._tokenizer, self.decode = tokenizer, decode

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


def test_the_reply_is_opened_as_the_trainer_opens_it(tmp_path):
    built = built_of("arch=hybrid")
    model, config = loaded(write_folder(tmp_path, built)), built.config
    record = Record("prompt", record_of(ONE).messages[:2], record_of(ONE).images)
    prompt = encode(record, build_processor(config, placement_rule(config.arch.name)), generate=True)
    inputs = model.inputs(record.messages, record.images, reply=True)
    assert ids_of(inputs.stream, model.tile_tokens) == prompt.tokens.tolist()


# --- the folder ---


def test_shards_give_the_same_model(tmp_path):
    built = built_of("arch=hybrid")
    record, folder = record_of(ONE), write_folder(tmp_path, built)
    whole = loaded(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    inputs = whole.inputs(record.messages, record.images)
    assert torch.equal(loaded(folder).logits(inputs), whole.logits(inputs))


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    folder = write_folder(tmp_path, built_of("arch=xattn"))
    tensors = load_file(folder / "model.safetensors")
    gate, norm = "language_model.model.layers.1.cross_attn.gate", "cross_keys.tile_norm.weight"
    changed = {name: t for name, t in tensors.items() if name != gate} | {"cross_keys.odd": torch.ones(1)}
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"missing \['{gate}'\], surplus \['cross_keys.odd'\]"):
        loaded(folder)
    save_file(tensors | {norm: torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{norm}: got shape \(3,\), expected \(20,\)"):
        loaded(folder)


def test_what_cannot_be_laid_out_is_refused(tmp_path):
    model = loaded(write_folder(tmp_path, built_of("arch=decoder")))
    with pytest.raises(ValueError, match="got 2 <image> marks and 1 images, expected a mark for each"):
        model.inputs([{"role": "user", "content": "<image><image>"}], [pictures()["L"]])
    with pytest.raises(ValueError, match="no message of role user"):
        model.inputs([{"role": "assistant", "content": "well"}])


def test_bf16_weights_stay_near(tmp_path):
    folder = write_folder(tmp_path, built_of("arch=hybrid"))
    half = module_of(folder).NVLM.from_folder(folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inputs = half.inputs(record_of(ONE).messages, record_of(ONE).images)
    assert gap(half.logits(inputs), loaded(folder).logits(inputs)) < 0.05


def test_it_runs_where_neither_this_package_nor_megatron_is(tmp_path):
    built = built_of("arch=hybrid")
    folder, record = write_folder(tmp_path, built, dummy_heads=1), record_of(ONE)
    record.images[0].save(tmp_path / "page.png")
    code = (
        "import sys\n"
        "blocked = ('megatron', 'nvlm', 'transformers', 'torchvision')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import torch\n"
        "from modeling_nvlm import NVLM\n"
        f"model = NVLM.from_folder({str(folder)!r}, dtype=torch.float32)\n"
        f"messages = {record.messages!r}\n"
        f"inputs = model.inputs(messages, [{str(tmp_path / 'page.png')!r}])\n"
        f"torch.save(model.logits(inputs), {str(tmp_path / 'logits.pt')!r})\n"
        f"model.answer(messages, [{str(tmp_path / 'page.png')!r}], max_new_tokens=3)\n"
        "assert not any(m.split('.')[0] in blocked and sys.modules[m] for m in sys.modules)\n"
    )
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, env=bare)
    assert gap(torch.load(tmp_path / "logits.pt"), expected_of(record, built).logits_SV) < TOLERANCE
