"""The files of one explained answer: the page, and the numbers beside it."""

from __future__ import annotations

import json
from pathlib import Path

from nvlm.arch.registry import placement_rule
from nvlm.config.values import Config
from nvlm.data.outline import build_processor
from nvlm.explain.looks import Looks, to_mapping
from nvlm.explain.page import Asked, page
from nvlm.generate.generator import Answer
from nvlm.inspect.pictures import pictures
from nvlm.runs.files import write_whole


def write(looks: Looks, config: Config, answer: Answer, question: str, out: Path) -> tuple[Path, Path]:
    """Write the page `out` and the numbers in NAME.looks.json; returns both paths."""
    values = out.with_suffix(".looks.json")
    processor = build_processor(config, placement_rule(config.arch.name))
    shown = pictures(answer.record, answer.sketch.pictures.plans, answer.prompt.pixels, processor)
    model = str(config.init.checkpoint or config.name)
    told = {"question": question, "answer": answer.text, "pictures": [picture.url for picture in shown]}
    write_whole(values, json.dumps(to_mapping(looks) | told) + "\n")
    write_whole(out, page(looks, Asked(model, question, answer.text, shown), values.name))
    return out, values
