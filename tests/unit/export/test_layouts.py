"""Exports in the layouts of LLaVA and VILA: what they refuse, chat templates, configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jinja2 import Environment

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.data.messages import Turn
from nvlm.data.text.formats import FORMATS
from nvlm.export.layouts import chat, llava, llava_hf, nvlm, vila
from nvlm.export.layouts.form import Written
from nvlm.export.layouts.registry import FORMS
from nvlm.export.plan import grown
from nvlm.weights.layouts import LAYOUTS
from tests import hub

TALK = [("system", "Be brief. "), ("user", " Hi\n"), ("assistant", "Hello "), ("user", "Who?")]


@pytest.fixture
def onevision():
    return compose_config(*hub.OWN["onevision"], *hub.SETTINGS)


def test_every_layout_that_is_read_is_written():
    assert FORMS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("chat_format", ["chatml", "llama3", "vicuna", "mistral"])
def test_templates_write_what_the_run_was_trained_with(chat_format, reply):
    form = FORMATS[chat_format]
    for talk in (TALK, TALK[1:], TALK[:2]):
        turns = [Turn(role, text) for role, text in talk]
        layout = form.layout(turns, reply and talk[-1][0] == "user")
        texts = [text.lstrip(a).rstrip(b) for (_, text), (a, b) in zip(talk, layout.trims)]
        expected = "".join(piece.text if piece.turn is None else texts[piece.turn] for piece in layout.pieces)
        template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
            chat.multimodal_template(form, "<s>", None)
        )
        parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]
        plain = [{"role": role, "content": text} for role, text in talk]
        ask = dict(add_generation_prompt=reply and talk[-1][0] == "user")
        assert template.render(messages=parts, **ask) == template.render(messages=plain, **ask) == "<s>" + expected


def test_a_template_has_pictures_and_the_default_system_message():
    template = chat.multimodal_template(FORMATS["vicuna"], None, "A chat.")
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    got = Environment().from_string(template).render(messages=[{"role": "user", "content": content}])
    assert got == "A chat. USER: <image>\nWhich? "


@pytest.mark.parametrize(
    ("check", "words", "reason"),
    [
        (llava_hf.check, ("vision=tiny",), "vision.encoder=internvit"),
        (llava_hf.check, ("projector=linear",), "projector: got linear, expected mlp2x_gelu"),
        (llava_hf.check, ("tiling=anyres", "tiling.tag=1d"), "tiling.tag: got 1d, expected none"),
        (llava_hf.check, ("data.image_marks=true",), "data.image_marks: got True, expected false"),
        (llava_hf.check, ("tiling=crops",), "tiling: got tiling.kind=crops"),
        (llava_hf.check, ("pooling=average",), "vision.downsample: got 2, expected 1"),
        (llava_hf.check, ("tiling.cap=2.5",), "tiling.cap: got 2.5, expected a whole number"),
        (llava_hf.check, ("arch=hybrid", "arch.cross_every=2"), "arch: got NVLM-H, expected arch=decoder"),
        (llava.check, ("vision.name=mine",), "vision: got mine, expected siglip-so400m"),
        (vila.check, (), "tiling: got anyres, expected one tile per image"),
        (vila.check, ("tiling=padded", "projector=mlp_downsample"), "pooling: got vision.downsample=1"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(check, words, reason):
    groups = [word for word in words if "." not in word.partition("=")[0]]
    own = [word for word in hub.OWN["onevision"] if not any(word.startswith(one.split("=")[0]) for one in groups)]
    kept = [word for word in hub.SETTINGS if not any(word.startswith(one.split("=")[0]) for one in groups)]
    if "vision=tiny" in words:
        kept = [word for word in kept if not word.startswith("vision.")]
    with pytest.raises(ConfigError, match=reason):
        check(compose_config(*own, *kept, *words))


@pytest.mark.parametrize(("tiling", "aspect"), [("padded", "pad"), ("single", "square"), ("anyres", "anyres")])
def test_the_class_follows_from_the_tiling(tiling, aspect):
    words = [word for word in hub.OWN["next"] if not word.startswith("tiling")]
    kept = [word for word in hub.SETTINGS if not word.startswith("tiling")]
    config = compose_config(*words, *kept, f"tiling={tiling}")
    llava_hf.check(config)
    assert llava_hf.family(config) == ("LlavaNext" if tiling == "anyres" else "Llava")
    written = Written(config=config, text=None, encoder=None, layers=3, code={})
    assert llava.describe(written)["image_aspect_ratio"] == aspect
    if tiling != "anyres":
        vila.check(config)
        assert llava_hf.pictures(config, "Llava")["do_pad"] == (tiling == "padded")


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (("video.pool=average", "video.before_projector=true"), "LlavaNextVideo", None),
        (("video.pool=average",), "LlavaNext", "videos are pooled or separated in another way"),
        ((), "LlavaNext", None),
    ],
)
def test_the_class_for_videos(words, kind, told):
    config = compose_config(*hub.OWN["next"], *hub.SETTINGS, *words)
    written = Written(config=config, text=None, encoder=None, layers=3, code={})
    described, note = llava_hf.describe(written), llava_hf.note(written)
    assert described["architectures"] == [f"{kind}ForConditionalGeneration"]
    assert described.get("spatial_pool_mode") == ("average" if kind == "LlavaNextVideo" else None)
    assert note is None if told is None else told in note


def test_the_vocabulary_has_the_tokens_of_pictures(onevision):
    assert chat.picture_tokens(onevision) == {"<image>": hub.IMAGE_ID, "<video>": hub.VIDEO_ID}
    assert llava_hf.rows(onevision, None) == 576
    small = replace(onevision, llm=replace(onevision.llm, vocab=hub.IMAGE_ID))
    assert llava_hf.rows(small, None) == 384


def test_new_words_are_the_mean_of_all():
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.bfloat16)
    assert grown(table, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert grown(table, 2) is table


@pytest.mark.parametrize("arch", ["decoder", "hybrid"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("tiling=anyres",), "tiling.kind: got anyres, expected dhr"),
        (("tiling=crops", "tiling.newline=false"), "tiling.kind: got crops, expected dhr"),  # no tensor would show it
        (("tiling=padded",), "tiling.kind: got anyres, expected dhr"),
        (
            ("projector=mlp2x_gelu",),
            "projector: got kind=mlp norm=False bias=True inner=hidden",
        ),
        (
            ("projector.inner=hidden",),
            "projector: got kind=mlp norm=True bias=False inner=hidden",
        ),
        (("data.image_marks=false",), "data.image_marks: got False, expected true"),
    ],
)
def test_what_nvlms_layout_cannot_hold_is_refused_before_anything_is_written(arch, words, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        nvlm.check(compose_config(f"arch={arch}", "data.seq_length=4096", "data.cross_length=4096", *words))
    assert ("layout=llava-hf" in str(refused.value)) == (arch == "decoder")  # the others have no such layout


def test_a_run_as_in_nvlm_has_its_layout():
    for arch in ("decoder", "xattn", "hybrid"):
        nvlm.check(compose_config(f"arch={arch}"))
