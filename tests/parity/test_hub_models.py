"""Models in transformers' LLaVA classes, read from their folders, have their logits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from nvlm.commands.compose import compose_config
from nvlm.generate.generator import Conversation, build_generator, prompt_of, prompt_processor
from nvlm.generate.parity import hub_inputs, logits
from nvlm.generate.sampling import GREEDY
from tests import hub

NEAR = dict(rtol=1e-4, atol=1e-4)
SIZES = {"wide": [(61, 30)], "small": [(20, 23)], "tall": [(31, 90)], "several": [(61, 30), (40, 44)], "none": []}

pytestmark = pytest.mark.usefixtures("megatron")


def picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        ("next", "of 2024"),
        ("onevision", "of transformers 5"),
        pytest.param("next", "of transformers 5", marks=pytest.mark.slow),
        pytest.param("onevision", "of 2024", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, kind, spelling):
    model = hub.write(tmp_path, kind, hub=spelling == "of 2024")
    config = compose_config(*hub.OWN[kind], *hub.SETTINGS, f"init.release={tmp_path}")
    generator = build_generator(config, torch.device("cpu"))
    processor = prompt_processor(config, GREEDY)
    for sizes in SIZES.values():
        content = " and ".join(["<image>"] * len(sizes)) + " are shown."
        conversation = Conversation([{"role": "user", "content": content}], [picture(size) for size in sizes])
        _, sketch, sample = prompt_of(0, conversation, processor)
        expected = hub.logits_of(model, **hub_inputs(model.config, config, sample, sketch))
        torch.testing.assert_close(logits(generator, sample), expected, **NEAR)
