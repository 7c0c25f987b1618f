"""Models in transformers' classes for videos, read from their folders, have their logits on a video's frames."""

from __future__ import annotations

import pytest
import torch
import transformers

from nvlm.commands.compose import compose_config
from nvlm.data.batch import IMAGE
from nvlm.data.video.clip import Video
from nvlm.generate.generator import Conversation, build_generator, prompt_of, prompt_processor
from nvlm.generate.parity import logits
from nvlm.generate.sampling import GREEDY
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from tests import hub
from tests.clips import clip

pytestmark = pytest.mark.usefixtures("megatron")

# LLaVA-OneVision pools projected frames, and one newline ends a video. transformers' LLaVA-NeXT-Video pools before the
# projector, as `pooling=` does for all tiles, and has no newline.
WAYS = {
    "onevision": ("video.pool=bilinear", "video.separator=once"),
    "next": ("pooling=average",),
}


def theirs(kind: str, folder) -> transformers.PreTrainedModel:
    model = hub.write(folder, kind)
    if kind == "onevision":
        return model
    values = model.config.to_dict() | {"spatial_pool_mode": "average", "spatial_pool_stride": 2}
    config = transformers.LlavaNextVideoConfig(
        **{key: values[key] for key in ("image_grid_pinpoints", "tie_word_embeddings", "spatial_pool_mode")},
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_index=hub.IMAGE_ID,
        video_token_index=hub.VIDEO_ID,
    )
    other = transformers.LlavaNextVideoForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", ["onevision", pytest.param("next", marks=pytest.mark.slow)])
def test_logits_on_a_video_are_those_of_transformers(tmp_path, kind):
    model = theirs(kind, tmp_path)
    settings = (*hub.OWN[kind], *WAYS[kind], *hub.SETTINGS, "video.frames=3", f"init.release={tmp_path}")
    config = compose_config(*settings)
    generator = build_generator(config, torch.device("cpu"))
    asked = Conversation([{"role": "user", "content": "<image> is shown."}], [Video(clip(20))])
    _, sketch, sample = prompt_of(0, asked, prompt_processor(config, GREEDY))
    tokens = sum(placement.lengths[0] for placement in sketch.placements)
    assert len(sample.pixels) == 3 and tokens == 3 * 4 + (kind == "onevision")
    encoder = description_of(config.vision)
    expected = hub.logits_of(
        model,
        input_ids=torch.where(sample.tokens == IMAGE, hub.VIDEO_ID, sample.tokens)[None],
        pixel_values_videos=normalize(sample.pixels, encoder.mean, encoder.std)[None],
    )
    torch.testing.assert_close(logits(generator, sample), expected, rtol=1e-4, atol=1e-4)
