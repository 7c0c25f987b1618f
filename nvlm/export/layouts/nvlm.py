"""Exports in NVLM-D-72B's layout, with the model in one PyTorch file beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.config.values import Config
from nvlm.export import readme
from nvlm.export.describe import describe, dump, exported_encoder, preprocessor
from nvlm.export.layouts.form import EncoderPart, Files, Form, Written
from nvlm.export.text import exported_text
from nvlm.weights.layouts import NVLM
from nvlm.weights.published import Source

CODE = Path(__file__).parents[1] / "modeling_nvlm.py"


def _encoder(config: Config, source: Source, spare: Source) -> Sequence[EncoderPart]:
    written = exported_encoder(config, source).parts
    pairs = zip(written, source.parts["vision"], strict=True)
    return [EncoderPart(written=one, read=own, source=source) for one, own in pairs]


def _files(written: Written) -> Files:
    config, text = written.config, written.text
    encoder = exported_encoder(config, written.encoder)
    return {
        "preprocessor_config.json": dump(preprocessor(config)),
        "README.md": readme.readme(config, encoder, list(written.code)),
        CODE.name: CODE,
        **written.code,
        **(text.files if text else {}),
        "config.json": dump(describe(config, encoder, text)),
    }


FORM = Form(
    layout=NVLM,
    check=lambda config: None,
    encoder=_encoder,
    text=lambda config: exported_text(config),
    rows=lambda config, text: config.llm.vocab,
    files=_files,
    note=lambda written: readme.note(written.config, exported_encoder(written.config, written.encoder)),
)
