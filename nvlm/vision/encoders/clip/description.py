"""CLIP (Radford et al. 2021): a class token, a norm before the first layer, x sigmoid(1.702 x) for GELU.

ViT-L/14-336 is the encoder of LLaVA-NeXT and of VILA, which use the patches of the last layer but one: 23 of 24.
"""

from __future__ import annotations

from nvlm.vision.encoders.tower.describe import Tower, describe

_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip

CLIP = describe(
    Tower(
        name="clip",
        model_type="clip_vision_model",
        defaults=_DEFAULTS,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        class_token=True,
        patch_bias=False,
        embedding_norm=True,
        classes="CLIP",
        ends_early=False,
        published={"clip-l-336": "openai/clip-vit-large-patch14-336"},
    )
)
