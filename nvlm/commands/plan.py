"""The plan command: ranks all parallel layouts of a number of GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nvlm.commands import launch
from nvlm.commands.compose import check_overrides
from nvlm.commands.mistakes import answered_or_helped
from nvlm.config.fields import named
from nvlm.config.hardware import GPU, GPUS, known_gpu
from nvlm.config.values import problem
from nvlm.estimate.layouts import plan
from nvlm.estimate.report import as_json, print_plan
from nvlm.runs.files import write_whole

HELP = f"""python launch/plan.py gpus=64 gpu=h100 [key=value ...]

gpus=N          GPUs of the whole run
gpu=NAME        one of {", ".join(GPUS)}; default: this machine's kind
top=8           layouts to show
tiles=N text=N  every sample has an image of N regular tiles and N tokens of text with labels
frames=N        every sample has a video of N frames instead of an image
json=PATH       writes all layouts that fit, with every part of their estimates
arch=hybrid llm=qwen2-72b precision=fp8_current +experiment=nvlm_h_72b_sft ...   as for launch/train.py;
                keys such as parallel.tensor=8 or train.recompute=full restrict the layouts"""

LEAST = {"gpus": 1, "top": 1, "tiles": 0, "text": 1, "frames": 1}  # of numbers
OPTIONS = (*LEAST, "json")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 if nothing fits."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    own = {key: value for key, _, value in (word.partition("=") for word in arguments) if key in OPTIONS}
    others = [word for word in arguments if word.partition("=")[0] not in OPTIONS]
    numbers = {key: _number(own, key, least) for key, least in LEAST.items()}
    if numbers["gpus"] is None:
        raise problem("gpus", "nothing", "the number of GPUs of the whole run", "gpus=64")
    if "json" in own and not Path(own["json"]).parent.is_dir():
        raise problem("json", named(own["json"]), "a file in an existing folder", "json=PATH")
    configs = check_overrides([*others, "dry_run=true"], OPTIONS)
    if len(configs) != 1:
        raise problem("command line", f"{len(configs)} configurations", "one", "give each key one value")
    (config,) = configs
    gpu = GPUS[config.gpu] if config.gpu else _here()
    if gpu.peak(config.precision.name) is None:
        raise problem(f"precision={config.precision.name}", f"gpu={config.gpu}", "a GPU with FP8", "precision=bf16")
    tiles, frames = numbers["tiles"], numbers["frames"]
    if tiles is not None and frames is not None:
        raise problem("frames", frames, "nothing beside tiles: a sample has an image or a video", "one of them alone")
    if frames is not None and frames > config.video.frames:
        fix = f"frames={config.video.frames}, or video.frames={frames}"
        raise problem("frames", frames, f"at most video.frames={config.video.frames}", fix)
    if tiles is not None and tiles > config.tiling.max_tiles:
        fix = f"tiles={config.tiling.max_tiles}, or tiling.max_tiles={tiles}"
        raise problem("tiles", tiles, f"at most tiling.max_tiles={config.tiling.max_tiles}", fix)
    fixed = [word.partition("=")[0].lstrip("+") for word in others]
    fixed = [key for key in fixed if "." in key]
    found = plan(config, numbers["gpus"], gpu, fixed, tiles, numbers["text"], frames or 0)
    print_plan(found, config, numbers["top"] or 8)
    if "json" in own:
        write_whole(Path(own["json"]), json.dumps(as_json(found), indent=1) + "\n")
    return 0 if found.fitting else 1


def _number(own: dict[str, str], key: str, least: int) -> int | None:
    """The option's value, or None."""
    if key not in own:
        return None
    text = own[key]
    if not text.isdecimal() or int(text) < least:
        raise problem(key, repr(text), f"a whole number of at least {least}", f"{key}={max(least, 8)}")
    return int(text)


def _here() -> GPU:
    """This machine's kind of GPU."""
    found = [known_gpu(name) for name, _ in launch.gpus_here()]
    if not found or found[0] is None:
        got = "nothing, on a machine without a GPU" if not found else "nothing, on a machine with an unknown GPU"
        raise problem("gpu", got, f"one of {', '.join(GPUS)}", "gpu=h100")
    return found[0]
