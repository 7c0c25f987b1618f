"""Compares a checkpoint with transformers' class on the folder that was exported from it: token ids and logits.

Both compute in fp32 on one question about one picture that is not square. Shapes: S tokens, V vocabulary, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nvlm.attention.cache import generating
from nvlm.config.values import Config
from nvlm.data.batch import IMAGE, Sample
from nvlm.data.outline import Outline
from nvlm.data.pack import collate
from nvlm.generate.config import read_config
from nvlm.generate.generator import Conversation, Generator, opened, prompt_of, prompt_processor
from nvlm.generate.sampling import GREEDY
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of

QUESTION = "What is this?"


@dataclass(frozen=True, slots=True)
class Parity:
    """`largest`: difference between the two models' log-probabilities; `same_ids`: whether transformers' processor
    makes the same tokens of the question and the picture."""

    tokens: int
    largest: float
    same_ids: bool


def parity(checkpoint: str, folder: Path, overrides: Sequence[str] = ()) -> Parity:
    """The comparison for a checkpoint and its export in llava-hf's layout. Needs transformers and room for two models.

    `overrides`: for the run's configuration. Raises ConfigError.
    """
    from transformers import AutoModelForImageTextToText

    with opened(read_config(checkpoint, ["precision=fp32", *overrides])) as generator:
        config = generator.config
        picture = example(config)
        conversation = Conversation([{"role": "user", "content": f"<image>\n{QUESTION}"}], [picture])
        _, sketch, sample = prompt_of(0, conversation, prompt_processor(config, GREEDY))
        ours_SV = logits(generator, sample)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = hub_inputs(model.config, config, sample, sketch)
    with torch.no_grad():
        theirs_SV = model(**inputs).logits[0, :, : ours_SV.shape[1]].log_softmax(-1)
    same = _ids(folder, picture) == inputs["input_ids"][0].tolist()
    return Parity(len(sample.tokens), float((ours_SV - theirs_SV).abs().max()), same)


def example(config: Config) -> Image.Image:
    """A picture of two tiles' width and one tile's height, with noise."""
    px = config.vision.tile_size
    noise = torch.randint(0, 256, (px, 2 * px, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def logits(generator: Generator, sample: Sample) -> Tensor:
    """Log-probabilities [S, V] after each token of a prompt, of all words that are in the vocabulary."""
    (model,) = generator.pipeline.parts
    row = collate([[sample]], generator.config.vision.tile_size, generator.config.row_multiple)
    (batch,) = generator.vision.encode([row.to(generator.device)])
    with generating([model]):
        hidden_SBH = model.hidden(batch)
        found = [model.last_logits(hidden_SBH, torch.tensor([column])) for column in range(len(sample.tokens))]
    return torch.cat(found)[:, : generator.config.llm.vocab].float().log_softmax(-1).cpu()


def hub_inputs(model: Any, config: Config, sample: Sample, sketch: Outline) -> dict[str, Tensor]:
    """What transformers' class needs to read the tokens and tiles of `sample`. `model`: that class's configuration."""
    inputs = {"input_ids": torch.where(sample.tokens == IMAGE, model.image_token_id, sample.tokens)[None]}
    if not sketch.pictures.plans:
        return inputs
    counts = [plan.num_tiles for plan in sketch.pictures.plans]
    pixels = hub_pixels(config, sample.pixels, counts)
    if model.model_type == "llava":
        return inputs | {"pixel_values": pixels[:, 0]}
    sizes = torch.tensor([[height, width] for width, height in sketch.pictures.sizes])
    several = {"batch_num_images": torch.tensor([len(counts)])} if model.model_type == "llava_onevision" else {}
    return inputs | {"pixel_values": pixels, "image_sizes": sizes} | several


def hub_pixels(config: Config, pixels_T3: Tensor, counts: Sequence[int]) -> Tensor:
    """Normalised tiles [images, most tiles of one, 3, px, px], the whole picture first and not last."""
    encoder = description_of(config.vision)
    tiles_T3 = normalize(pixels_T3, encoder.mean, encoder.std)
    images = [torch.cat((some[-1:], some[:-1])) for some in tiles_T3.split(list(counts))]
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True)


def _ids(folder: Path, picture: Image.Image) -> list[int]:
    """The token ids of transformers' processor."""
    from transformers import AutoProcessor

    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return torch.as_tensor(inputs["input_ids"]).flatten().tolist()
