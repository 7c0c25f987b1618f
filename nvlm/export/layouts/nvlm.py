"""Exports in NVLM-D-72B's layout, with the model in one PyTorch file beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.arch.registry import description
from nvlm.config.values import Config, problem
from nvlm.export import readme
from nvlm.export.describe import describe, dump, exported_encoder, preprocessor
from nvlm.export.layouts.form import EncoderPart, Files, Form, Written
from nvlm.export.layouts.limits import GENERATE
from nvlm.export.text import exported_text
from nvlm.weights.layouts import NVLM
from nvlm.weights.published import Source

CODE = Path(__file__).parents[1] / "modeling_nvlm.py"


def check(config: Config) -> None:
    """Raise ConfigError if modeling_nvlm.py does not compute what the run's model does."""
    projector, tiling, kind = config.projector, config.tiling, description(config.arch.name)
    fix = GENERATE if kind.keys else f"layout=llava-hf, or {GENERATE}"
    built = (kind.projector_kind(projector), projector.norm, projector.bias, projector.inner)
    if built != (kind.projector, True, False, "ffn"):
        got = f"kind={built[0]} norm={projector.norm} bias={projector.bias} inner={projector.inner}"
        raise problem("projector", got, "projector=nvlm, which is all that modeling_nvlm.py has", fix)
    if tiling.kind != "dhr":
        raise problem("tiling.kind", tiling.kind, "dhr, which is all that modeling_nvlm.py has", fix)
    if not config.data.image_marks:
        raise problem("data.image_marks", False, "true: modeling_nvlm.py writes <Image> and </Image>", fix)


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
    check=check,
    encoder=_encoder,
    text=lambda config: exported_text(config),
    rows=lambda config, text: config.llm.vocab,
    files=_files,
    note=lambda written: readme.note(written.config, exported_encoder(written.config, written.encoder)),
)
