"""The description of NVLM-D."""

from __future__ import annotations

from nvlm.arch.description import Description

DESCRIPTION = Description(
    title="NVLM-D",
    tiles_in_stream=True,
    keys=(),
    projector="mlp",
    carried=lambda llm: (),
    joins_text=True,
    release_code={
        "AutoConfig": "configuration_nvlm_d.NVLM_D_Config",
        "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
        "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
    },
)
