"""What lmms-eval finds by the entry point `lmms_eval.models`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The name of the model, and where its class is."""
    return ModelManifest("nvlm", simple_class_path="nvlm.lmms.model.NVLM")
