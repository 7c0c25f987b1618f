"""Imports each package in a separate process and asks it a few questions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT = 120.0  # seconds for an import: from a slow network disk, torch alone takes a minute


@dataclass(frozen=True, slots=True)
class Probe:
    """A package's answers: `values`, or the `reason` why there are none."""

    values: Mapping[str, object]
    reason: str = ""


# Expressions to evaluate after the import of a package. Each is evaluated separately, so any may fail.
QUESTIONS = {
    "torch": {
        "version": "m.__version__",
        "built_for": "m.version.cuda",
        "usable": "m.cuda.is_available()",
        "cudnn": "m.backends.cudnn.version()",
        "nccl": "'.'.join(map(str, m.cuda.nccl.version()))",
        "gpus": "[m.cuda.get_device_name(i) for i in range(m.cuda.device_count())]",
        "capability": "list(m.cuda.get_device_capability())",
    },
    "torchvision": {"resizes": "bool(__import__('torchvision.transforms.v2.functional').ops.nms)"},
    "megatron.core": {"version": "m.__version__"},
    "transformer_engine.pytorch": {"version": "__import__('transformer_engine').__version__"},
    "flash_attn": {"version": "m.__version__"},
    "apex": {"fused": "bool(__import__('amp_C').multi_tensor_adam)"},
    "psutil": {},
}
# Packages that link against libraries which only torch can locate, such as NCCL: torch is imported first.
BUILT_ON_TORCH = ("torchvision", "megatron.core", "transformer_engine.pytorch", "flash_attn", "apex")


def probe(module: str, timeout: float = TIMEOUT) -> Probe:
    """Import `module` in another process, as the trainer would, and evaluate its QUESTIONS."""
    code = (
        f"import importlib, json, sys{', torch' if module in BUILT_ON_TORCH else ''}\n"
        f"m, answers = importlib.import_module({module!r}), {{}}\n"
        f"for name, question in {QUESTIONS.get(module, {})!r}.items():\n"
        "    try: answers[name] = eval(question)\n"
        "    except Exception: pass\n"
        "print('\\n' + json.dumps(answers, default=str))\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Probe({}, f"its import takes more than {timeout:g} s")
    if done.returncode < 0:
        return Probe({}, f"its import is killed by signal {-done.returncode}")
    if done.returncode:
        return Probe({}, last_line(done.stderr) or f"its import ends with status {done.returncode}")
    try:
        return Probe(json.loads(last_line(done.stdout)))
    except ValueError:
        return Probe({}, "its import ends the process")


def last_line(text: str) -> str:
    """The last nonempty line of `text`."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def findable(module: str) -> bool:
    """Whether a top-level module can be found, with or without metadata."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
