"""The description of NVLM-H."""

from __future__ import annotations

from nvlm.arch.description import Description
from nvlm.arch.xattn.description import gated_cross_attention

DESCRIPTION = Description(
    title="NVLM-H",
    tiles_in_stream=True,
    keys=("tile", "tag"),
    projector="mlp",
    carried=gated_cross_attention,
    joins_text=False,
    release_code=None,
)
