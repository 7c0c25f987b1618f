"""Exports in llava-hf's layout, which transformers and vLLM load: LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video, OneVision."""

from __future__ import annotations

import math

from nvlm.config.tiles import grid_of
from nvlm.config.values import Config, problem
from nvlm.export.describe import dump, language
from nvlm.export.layouts import chat
from nvlm.export.layouts.form import Files, Form, Written
from nvlm.export.layouts.limits import GENERATE, check_decoder, one_tile
from nvlm.export.layouts.tower import hub_encoder, llava_encoder
from nvlm.export.text import Text
from nvlm.inputs.whole import projector_type
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.layouts import LLAVA_HF

_MULTIPLE = 64  # of the vocabulary's rows, as in llava-hf's models
_MODEL_TYPES = {
    "Llava": "llava",
    "LlavaNext": "llava_next",
    "LlavaNextVideo": "llava_next_video",
    "LlavaOnevision": "llava_onevision",
}
_POOLS = ("average", "max")  # of LLaVA-NeXT-Video, before the projector
_VIDEOS = ("LlavaNextVideo", "LlavaOnevision")


def family(config: Config) -> str:
    """The class for the run's tiling, without its ending ForConditionalGeneration. Raises ConfigError if none fits."""
    tiling = config.tiling
    if tiling.kind == "anyres" and tiling.newline:
        if tiling.cap is not None:
            return "LlavaOnevision"
        return "LlavaNextVideo" if config.video.before_projector and config.video.pool in _POOLS else "LlavaNext"
    if one_tile(config):
        return "Llava"
    got = f"tiling.kind={tiling.kind} tiling.max_tiles={tiling.max_tiles}"
    raise problem("tiling", got, "anyres with newline, or one tile, which are all that transformers has", GENERATE)


def check(config: Config) -> None:
    """Raise ConfigError if none of transformers' classes computes what the run's model does."""
    check_decoder(config)
    hub_encoder(config)
    kind, cap = family(config), config.tiling.cap
    if (found := projector_type(config)) != "mlp2x_gelu":
        raise problem("projector", found or config.projector.name, "mlp2x_gelu: transformers has no other", GENERATE)
    if config.vision.downsample != 1:
        expected = "1: transformers pools no pictures"
        raise problem("vision.downsample", config.vision.downsample, expected, GENERATE)
    if kind == "LlavaOnevision" and cap != int(cap):
        raise problem("tiling.cap", cap, "a whole number, which is all that transformers reads", GENERATE)


def rows(config: Config, text: Text | None) -> int:
    """Rows of the vocabulary: all words and the tokens of pictures, up to a multiple of 64."""
    needed = max(config.llm.vocab, *(number + 1 for number in chat.picture_tokens(config).values()))
    return math.ceil(needed / _MULTIPLE) * _MULTIPLE


def pinpoints(config: Config) -> list[list[int]]:
    """The grids in px, as [height, width]."""
    px = config.vision.tile_size
    return [[rows * px, columns * px] for columns, rows in map(grid_of, config.tiling.pinpoints)]


def describe(written: Written) -> dict:
    """config.json."""
    config, kind, hub = written.config, family(written.config), hub_encoder(written.config)
    tokens, text = chat.picture_tokens(config), text_config(written)
    videos = kind in _VIDEOS
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": _MODEL_TYPES[kind],
        "image_token_index": tokens[chat.IMAGE],
        **({"video_token_index": tokens[chat.VIDEO]} if videos else {}),
        **({"image_grid_pinpoints": pinpoints(config)} if kind != "Llava" else {}),
        **({"vision_aspect_ratio": _aspect(config)} if kind == "LlavaOnevision" else {}),
        **({"spatial_pool_mode": config.video.pool, "spatial_pool_stride": 2} if kind == "LlavaNextVideo" else {}),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.layers - written.layers - 1,
        "vision_feature_select_strategy": hub.strategy,
        "tie_word_embeddings": config.llm.tied,
        "torch_dtype": text["torch_dtype"],
        "text_config": text,
        "vision_config": dict(hub.config(config.vision, written.layers)),
    }


def text_config(written: Written) -> dict:
    """The language model's config.json."""
    values = language(written.config)
    kind = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}.get(values["architectures"][0], "llama")
    marks = {"bos_token_id": written.text.begin, "eos_token_id": written.text.end} if written.text else {}
    return {**values, "model_type": kind, **marks}


def _aspect(config: Config) -> str:
    return f"anyres_max_{int(config.tiling.cap)}"


def pictures(config: Config, kind: str) -> dict:
    """preprocessor_config.json."""
    px, encoder = config.vision.tile_size, description_of(config.vision)
    square, padded = {"height": px, "width": px}, config.tiling.base == "pad"
    common = dict(
        do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True, image_mean=list(encoder.mean),
        image_std=list(encoder.std), processor_class=f"{kind}Processor", resample=3, rescale_factor=1 / 255,
    )  # fmt: skip
    if kind == "Llava":
        own = dict(image_processor_type="LlavaImageProcessor", size=square, do_center_crop=False, do_pad=padded)
        return common | own
    return common | dict(
        image_processor_type=f"{'LlavaOnevision' if kind == 'LlavaOnevision' else 'LlavaNext'}ImageProcessor",
        size=square if kind == "LlavaOnevision" else {"shortest_edge": px},
        **({} if kind == "LlavaOnevision" else {"crop_size": square, "do_center_crop": True}),
        do_pad=True,
        image_grid_pinpoints=pinpoints(config),
    )


def processor(config: Config, kind: str) -> dict:
    """processor_config.json."""
    hub, vision = hub_encoder(config), config.vision
    common = dict(
        processor_class=f"{kind}Processor", image_token=chat.IMAGE, vision_feature_select_strategy=hub.strategy
    )
    if kind in _VIDEOS:
        common["video_token"] = chat.VIDEO
    if kind == "LlavaOnevision":  # where "default" takes the class token off this count
        tokens = vision.tile_tokens + (hub.strategy == "default")
        return common | dict(num_image_tokens=tokens, vision_aspect_ratio=_aspect(config))
    return common | dict(patch_size=vision.patch, num_additional_image_tokens=int(hub.strategy == "default"))


def videos(config: Config, kind: str) -> dict:
    """video_preprocessor_config.json."""
    own = pictures(config, kind)
    names = ("image_mean", "image_std", "do_normalize", "do_rescale", "do_resize", "do_convert_rgb", "resample")
    px = config.vision.tile_size
    return {
        **{name: own[name] for name in (*names, "rescale_factor", "processor_class")},
        "video_processor_type": "LlavaOnevisionVideoProcessor" if kind == "LlavaOnevision" else f"{kind}VideoProcessor",
        "size": {"height": px, "width": px},
        "do_center_crop": False,
    }


def files(written: Written) -> Files:
    """All files but the tensors."""
    config, kind = written.config, family(written.config)
    return {
        "preprocessor_config.json": dump(pictures(config, kind)),
        **({"video_preprocessor_config.json": dump(videos(config, kind))} if kind in _VIDEOS else {}),
        "processor_config.json": dump(processor(config, kind)),
        **written.text.files,
        "README.md": _readme(config, kind),
        "config.json": dump(describe(written)),
    }


def _readme(config: Config, kind: str) -> str:
    return "\n".join((
        f"# {config.name}",
        "",
        f"{config.llm.name}, {config.vision.name}, in the layout of llava-hf: transformers loads it as",
        f"{kind}ForConditionalGeneration. vLLM has the same class (`vllm serve .`), which no test here runs.",
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'processor = AutoProcessor.from_pretrained(".")',
        'model = AutoModelForImageTextToText.from_pretrained(".")',
        'content = [{"type": "image", "url": "page.png"}, {"type": "text", "text": "What is this?"}]',
        'messages = [{"role": "user", "content": content}]',
        "inputs = processor.apply_chat_template(",
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
        "print(processor.decode(model.generate(**inputs, max_new_tokens=128)[0]))",
        "```",
        "",
    ))  # fmt: skip


def _same_videos(config: Config, kind: str) -> bool:
    video = config.video
    if kind == "LlavaOnevision":
        return (video.pool, video.before_projector, video.separator) == ("bilinear", False, "once")
    return kind == "LlavaNextVideo" and video.separator == "none"


def note(written: Written) -> str | None:
    """Where transformers' processor prepares pictures in another way than the run did."""
    config, kind = written.config, family(written.config)
    tiling = config.tiling
    if kind == "Llava":
        return None
    differ = []
    if tiling.base != "stretch":
        differ.append("the whole picture is stretched there, not padded")
    several = "base" if kind == "LlavaOnevision" else "same"
    if tiling.several != several:
        differ.append(f"several images of a record are treated as with tiling.several={several}")
    if tiling.unpad == "down":
        differ.append("a few image sizes (such as 820 x 1107) get other numbers of tokens, as with tiling.unpad=digits")
    if config.video.pool != "none" and not _same_videos(config, kind):
        differ.append("videos are pooled or separated in another way")
    return f"transformers' processor differs from this run: {'; '.join(differ)}" if differ else None


FORM = Form(layout=LLAVA_HF, check=check, encoder=llava_encoder, text=chat.chat_text, rows=rows, files=files, note=note)
