"""SigLIP (Zhai et al. 2023): no class token, biases everywhere, tanh-GELU.

so400m-patch14-384 is the encoder of LLaVA-OneVision and VILA-1.5, which use the output of layer 26 of 27, before the
final norm. Its 384 px are not a multiple of 14: the last 6 px on the right and at the bottom are not seen.
"""

from __future__ import annotations

from nvlm.vision.encoders.tower.describe import Tower, describe

_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
)  # fmt: skip

SIGLIP = describe(
    Tower(
        name="siglip",
        model_type="siglip_vision_model",
        defaults=_DEFAULTS,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_token=False,
        patch_bias=True,
        embedding_norm=False,
        classes="Siglip",
        ends_early=True,
        published={"siglip-so400m": "google/siglip-so400m-patch14-384"},
    )
)
