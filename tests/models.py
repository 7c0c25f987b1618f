"""Our models with the reference's weights, and the same records for both.

What a record means to the reference is written out here independently, from its text, images and tags: nothing of
nvlm.data or the placements is used except the tokenizer, so a mistake in them shows up as a difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.pipeline import build_parts
from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config, cross_layers
from nvlm.data.batch import Batch, Sample
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.data.text.tokenizer import load_tokenizer
from nvlm.data.video.clip import Video
from nvlm.vision.encoders.inference import FrozenEncoder
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import VisionPath, solo_groups
from nvlm.weights import llm
from nvlm.weights.parts import joined, published
from tests.clips import clip
from tests.parity.reference import NO_LOSS, RefDims, ReferenceNVLM, RefSample, Segment

TILE = 8  # px
STD = 0.15  # large enough that no part of the model is lost in rounding, small enough that fp32 is not
# Sizes in which no two that could be mixed up are equal; five layers, so that the last one has no
# cross-attention; an eps that shows.
SMALL = """precision=fp32
vision.hidden=12 vision.layers=2 vision.heads=3 vision.ffn=20 vision.patch=2 vision.tile_size=8
llm.layers=5 llm.hidden=20 llm.heads=4 llm.kv_heads=2 llm.head_dim=6 llm.ffn=28 llm.vocab=344
llm.cross_every=2 llm.rope_theta=5000 llm.norm_eps=1e-3 tiling.resize=exact data.system=null
""".split()


@cache
def small_config(*overrides: str) -> Config:
    """conf/ at toy size, with `overrides` in Hydra's notation."""
    return compose_config(*SMALL, *overrides)


def dims_of(config: Config) -> RefDims:
    """The sizes for the reference."""
    vision, language = config.vision, config.llm
    return RefDims(
        vit_hidden=vision.hidden,
        vit_layers=vision.layers,
        vit_heads=vision.heads,
        vit_ffn=vision.ffn,
        patch=vision.patch,
        image=vision.tile_size,
        layers=language.layers,
        hidden=language.hidden,
        heads=language.heads,
        kv_heads=language.kv_heads,
        head_dim=language.head_dim,
        ffn=language.ffn,
        vocab=language.vocab,
        rope_theta=language.rope_theta,
        eps=language.norm_eps,
        qkv_bias=language.qkv_bias,
        tied=language.tied,
        arch=config.arch.name,
        qk_norm=language.qk_norm,
        interpolation=language.rope_interpolation,
        every=config.arch.cross_every,
        bind_tags=config.arch.bind_tags,
        latest=config.arch.sees == "latest",
    )


def projector_names(arch: str) -> dict[str, str]:
    """Reference name -> ours."""
    linears = {"mlp1.1.weight": "encoder.weight"}
    if arch != "xattn":
        linears = {"mlp1.1.weight": "encoder.linear_fc1.weight", "mlp1.3.weight": "encoder.linear_fc2.weight"}
    norms = {f"mlp1.0.{kind}": f"projector.norm.{kind}" for kind in ("weight", "bias")}
    kinds = {"decoder": (), "xattn": ("tile_norm",), "hybrid": ("tile_norm", "tag_norm")}[arch]
    keys = {f"cross_keys.{kind}.weight": f"fusion.{kind}.weight" for kind in kinds}
    return norms | keys | {theirs: f"projector.layers.{ours}" for theirs, ours in linears.items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def to_ours(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The reference's tensors (encoder apart) under our names."""
    ours = joined(llm.parts(config.llm, cross_layers(config)), below("language_model.", state))
    return ours | {name: state[theirs] for theirs, name in projector_names(config.arch.name).items()}


def to_reference(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our tensors, or their gradients, under the reference's names."""
    named = published(llm.parts(config.llm, cross_layers(config)), state)
    theirs = {f"language_model.{name}": t for name, t in named.items()}
    return theirs | {theirs: state[name] for theirs, name in projector_names(config.arch.name).items()}


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the whole model, whatever modules it is made of."""
    whole = module.whole_name if isinstance(module, VisionLanguageModel) else str
    return {whole(name): parameter for name, parameter in module.named_parameters()}


def load(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of `module`: exactly these names, with equal shapes."""
    parameters = parameters_of(module)
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.data.copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class Twins:
    """One set of weights twice, ours in fp32 and the reference in fp64, so that the gap is only our rounding."""

    config: Config
    model: VisionLanguageModel
    vision: VisionPath
    reference: ReferenceNVLM


def build_twins(config: Config, gates: float | None = None, seed: int = 1) -> Twins:
    """Random weights of standard deviation STD (gates open unless given). If ours has adapters, they are active, and
    the reference has them merged."""
    reference = ReferenceNVLM(dims_of(config)).init(seed, STD, gates)
    state = dict(reference.named_parameters())
    (model,) = build_parts(config)
    load(model, to_ours(state, config) | awake_adapters(model))
    encoder = InternViT(config, solo_groups())
    vision = config.vision
    load(encoder, joined(internvit.parts(vision), below("vision_model.", state)))
    reference.double()
    if config.adapted:
        reference.load_state_dict(to_reference(merged_weights(model, config), config), strict=False)
    return Twins(config, model, VisionPath(FrozenEncoder(encoder, vision), vision), reference)


def awake_adapters(model: VisionLanguageModel) -> dict[str, Tensor]:
    """The model's initial adapter weights, with random values instead of zeros."""
    generator, found = torch.Generator().manual_seed(11), {}
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            noise = STD * torch.randn(parameter.shape, generator=generator)
            found[name] = noise if name.endswith(".up.weight") else parameter.detach().clone()
    return found


def adapters_of(model: VisionLanguageModel) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by the name of the weight that they belong to."""
    named = dict(model.named_parameters())
    bases = [name.replace("adapter.down.", "") for name in named if name.endswith(".adapter.down.weight")]
    return {b: tuple(named[b.replace(".weight", f".adapter.{part}.weight")] for part in ("down", "up")) for b in bases}


@torch.no_grad()
def merged_weights(model: VisionLanguageModel, config: Config) -> dict[str, Tensor]:
    """Weights in fp64, under the names of a model without adapters."""
    named = {name: p.double() for name, p in model.weights().items() if ".adapter." not in name}
    for name, (down, up) in adapters_of(model).items():
        named[name] = named[name] + config.peft.alpha / config.peft.rank * (up.double() @ down.double())
    return named


def adapter_gradients(twins: Twins, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of our adapters from the reference's `gradients` of the merged weights, by the chain rule through up @
    down."""
    ours, found = to_ours(gradients, twins.config), {}
    scale = twins.config.peft.alpha / twins.config.peft.rank
    for name, (down, up) in adapters_of(twins.model).items():
        found[name.replace(".weight", ".adapter.down.weight")] = scale * up.detach().double().T @ ours[name]
        found[name.replace(".weight", ".adapter.up.weight")] = scale * ours[name] @ down.detach().double().T
    return found


def loss_and_gradients(twins: Twins, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss of each token [B, S], and the gradients of its sum under the reference's names."""
    twins.model.zero_grad(set_to_none=True)
    loss_BS = twins.model(batch).view_as(batch.tokens)  # rows may come in a line
    torch.autograd.backward(loss_BS.sum())  # unlike a tensor's own method, within the modes that are on
    gradients = {name: parameter.grad for name, parameter in parameters_of(twins.model).items()}
    return loss_BS.detach(), to_reference(gradients, twins.config)


# --- records ---


@dataclass(frozen=True)
class Story:
    """A conversation of (role, text) with `<image>` for each image of (columns, rows) tiles, and after them for each
    video of so many frames. `form`: how the record marks them; "parts" as content parts, "unmarked" without marks."""

    name: str
    turns: tuple[tuple[str, str], ...]
    grids: tuple[tuple[int, int], ...] = ()
    form: str = "marks"
    videos: tuple[int, ...] = ()

    @property
    def pictures(self) -> list[np.ndarray]:
        """uint8 [height, width, 3] noise of exactly the grid's size, so that no resize blurs a tile."""
        generator = np.random.default_rng([ord(c) for c in self.name])
        return [generator.integers(256, size=(r * TILE, c * TILE, 3), dtype=np.uint8) for c, r in self.grids]


def record_of(story: Story) -> Record:
    """The record that a data source would return."""
    messages = []
    for role, words in story.turns:
        content = words.replace("<image>\n", "") if story.form == "unmarked" else words
        if story.form == "parts" and "<image>" in words:
            pieces = [[{"type": "text", "text": text}] for text in words.split("<image>")]
            content = list(itertools.chain(pieces[0], *([{"type": "image"}, *piece] for piece in pieces[1:])))
        messages.append({"role": role, "content": content})
    videos = [Video(clip(frames)) for frames in story.videos]
    return Record(story.name, messages, [*map(Image.fromarray, story.pictures), *videos])


def sample_of(story: Story, config: Config) -> Sample:
    """The story's sample from our pipeline."""
    return encode(record_of(story), build_processor(config, placement_rule(config.arch.name)))


def batch_of(rows: Sequence[Sequence[Story]], twins: Twins) -> Batch:
    """The stories, packed as given, from our pipeline and our encoder."""
    samples = [[sample_of(story, twins.config) for story in row] for row in rows]
    return twins.vision.encode(collate(samples, twins.config.vision.tile_size))


def tag_names(columns: int, rows: int, style: str) -> list[str]:
    """Tags of regular tiles in reading order, then the thumbnail's."""
    cells = [(c, r) for r in range(rows) for c in range(columns)] if columns * rows > 1 else []
    if style == "none":
        return [""] * (len(cells) + 1)
    if style == "2d_bbox":

        def box(left: float, top: float, right: float, bottom: float) -> str:
            x0, x1 = (int(999 * edge / columns + 0.5) for edge in (left, right))
            y0, y1 = (int(999 * edge / rows + 0.5) for edge in (top, bottom))
            return f"<box> ({x0}, {y0}), ({x1}, {y1}) </box>"

        return [*(box(c, r, c + 1, r + 1) for c, r in cells), box(0, 0, columns, rows)]
    names = [f"<tile_x{c}_y{r}>" if style == "2d_grid" else f"<tile_{i}>" for i, (c, r) in enumerate(cells, 1)]
    return [*names, "<tile_global_thumbnail>"]


def cut(picture: np.ndarray) -> list[Tensor]:
    """uint8 [3, px, px] of each regular tile in reading order, then of the thumbnail."""
    thumbnail = np.array(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.BICUBIC))
    height, width = picture.shape[:2]
    corners = [(y, x) for y in range(0, height, TILE) for x in range(0, width, TILE)]
    tiles = [picture[y : y + TILE, x : x + TILE] for y, x in corners] if len(corners) > 1 else []
    return [torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in [*tiles, thumbnail]]


def reference_sample(story: Story, config: Config) -> RefSample:
    """The story in the reference's form."""
    tokenizer, arch = load_tokenizer("tiny"), config.arch.name
    im_start, im_end = (tokenizer.tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    out = RefSample(stream=[])
    targets: list[int] = []  # what predicting each token of the stream is worth
    numbers = itertools.count()

    def say(ids: Sequence[int], learns: bool = False) -> None:
        out.stream.append(Segment("text", tuple(ids)))
        targets.extend(ids if learns else [NO_LOSS] * len(ids))

    def show() -> None:
        image = next(numbers)
        names = tag_names(*story.grids[image], config.tiling.tag)
        out.tiles.update({(image, t): pixels for t, pixels in enumerate(cut(story.pictures[image]))})
        last = len(names) - 1
        tags = [Segment("tag", tokenizer.encode(name), image, t) for t, name in enumerate(names)]
        tiles = [Segment("tile", (), image, t) for t in range(len(names))]
        tagged = [list(pair) for pair in zip(tags, tiles)]
        if arch == "decoder":
            block = sum(tagged, [])
        elif arch == "xattn":
            block = tags
            out.cross.extend(tiles)
        else:
            block = tagged[last]
            out.cross.extend(sum(tagged[:last], []))
        out.stream.extend(block)
        positions = sum(config.vision.tile_tokens if s.kind == "tile" else len(s.ids) for s in block)
        targets.extend([NO_LOSS] * positions)

    for role, words in story.turns:
        learns = role == "assistant"
        say([im_start, *tokenizer.encode(role + "\n")])
        for i, fragment in enumerate(words.split("<image>")):
            if i:
                say(tokenizer.encode("<Image>"))
                show()
                say(tokenizer.encode("</Image>"))
            say(tokenizer.encode(fragment), learns)
        say([im_end], learns)
        say(tokenizer.encode("\n"))
    out.labels = targets[1:] + [NO_LOSS]
    return out
