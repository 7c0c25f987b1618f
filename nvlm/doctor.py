"""What this machine has to train with: `python -m nvlm.doctor [--tokenizer DIR]`.

One row for each thing, what its absence costs and the line that mends it. Exit status 1 where training is impossible.
Needs nothing but Python: packages are looked up by their metadata and imported in processes of their own, since a
broken one may crash or hang.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import TE_INSTALL

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120.0  # seconds for an import: from a slow network disk torch alone takes a minute
OK, COSTS, STOPS = "ok", "costs", "STOPS"
GB = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One thing. `state`: OK, COSTS where something is lost without it, STOPS where nothing trains without it."""

    name: str
    state: str
    found: str
    costs: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a package told in a process of its own: `values`, or the `reason` why it told nothing."""

    values: Mapping[str, object]
    reason: str = ""


# What is asked of a package once it is imported; each expression on its own, so that one may fail.
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
# Packages that link against libraries which only torch finds, such as NCCL's: torch is imported before them.
BUILT_ON_TORCH = ("torchvision", "megatron.core", "transformer_engine.pytorch", "flash_attn", "apex")
# Import names where they are not the package's own.
MODULES = {"hydra-core": "hydra", "pillow": "PIL", "megatron-core": "megatron.core"}
COSTS_OF = {
    "psutil": "Megatron's checkpoints hang without it",
    "pillow": "images cannot be read",
    "torch": "nothing runs",
    "megatron-core": "no model can be built",
}


def probe(module: str, timeout: float = TIMEOUT) -> Probe:
    """Import `module` in another process, as the trainer would, and ask it its QUESTIONS."""
    code = (
        f"import importlib, json, sys{', torch' if module in BUILT_ON_TORCH else ''}\n"
        f"m, told = importlib.import_module({module!r}), {{}}\n"
        f"for name, question in {QUESTIONS.get(module, {})!r}.items():\n"
        "    try: told[name] = eval(question)\n"
        "    except Exception: pass\n"
        "print('\\n' + json.dumps(told, default=str))\n"
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
    """The last line of `text` that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def there(module: str) -> bool:
    """Whether a top-level module can be found, with or without metadata."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def requirements(path: Path = ROOT / "setup.py") -> dict[str, str]:
    """What setup.py requires: package -> version specifier. Read, not run."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            found = (re.match(r"([\w.-]+)(.*)", line) for line in ast.literal_eval(node.value))
            return {match[1]: match[2].strip() for match in found if match}
    return {}


def pinned(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """What constraints.txt pins: package -> version."""
    lines = (line.strip().partition("==") for line in path.read_text().splitlines())
    return {name: version for name, found, version in lines if found}


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version; a build before the release counts as less than it."""
    match = re.match(r"(\d+(?:\.\d+)*)(a|b|rc|\.?dev)?", version)
    if not match:
        return ()
    release = [int(n) for n in match[1].split(".")]
    release += [0] * (4 - len(release))
    return (*release, -1 if match[2] else 0)


def satisfies(version: str, specifier: str) -> bool:
    """Whether `version` is within a specifier of >=, < and ==."""
    for part in filter(None, (part.strip() for part in specifier.split(","))):
        sign, bound = re.match(r"(>=|<|==)(.+)", part).groups()
        have, want = numbers(version), numbers(bound)
        if not {">=": have >= want, "<": have < want, "==": have == want}[sign]:
            return False
    return True


def install(requirement: str) -> str:
    """The line that installs a package: NVIDIA's images have constraints of their own, which pip follows by itself."""
    pins = "" if "NVIDIA_PYTORCH_VERSION" in os.environ else f" -c {ROOT / 'constraints.txt'}"
    return f"pip install{pins} '{requirement}'"


# --- rows ---


def python_row() -> Row:
    """The interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if not satisfies(found, ">=3.12"):
        return Row("Python", STOPS, found, "Megatron-Core needs 3.12 or later", "python3.12 -m venv .venv")
    return Row("Python", OK, found)


def package_row(package: str, specifier: str, told: Mapping[str, Probe]) -> Row:
    """A package that setup.py requires."""
    module = MODULES.get(package, package)
    version = installed(package) or (str(told[module].values.get("version", "")) if module in told else "")
    fix, costs = install(f"{package}{specifier}"), COSTS_OF.get(package, "training does not start")
    if not there(module.split(".")[0]):
        return Row(package, STOPS, f"{version}, but no module {module}" if version else "missing", costs, fix)
    if reason := told[module].reason if module in told else "":
        found = f"{version or 'installed'}, does not load: {reason}"
        return Row(package, STOPS, found, costs, f"{fix} --force-reinstall --no-deps")
    if version and not satisfies(version, specifier):
        return Row(package, STOPS, f"{version}, {specifier} is required", "this version is not what was built for", fix)
    pin = pinned().get(package)
    if package == "pillow" and pin and version != pin:
        costs = f"tilings differ by a few levels from those of {pin}, with which they were tested"
        return Row(package, COSTS, version, costs, install(f"pillow=={pin}"))
    return Row(package, OK, version or "installed")


def gpu_row(torch: Probe, has_torch: bool) -> Row:
    """GPUs, their driver, and whether torch can use them."""
    answer = _nvidia_smi("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if not answer:
        costs = "tiny models train on the CPU; full-size ones only build (dry_run=true)"
        return Row("GPU and driver", COSTS, "none seen by nvidia-smi", costs, "run on a machine with an NVIDIA driver")
    first, count = answer.splitlines()[0], len(answer.splitlines())
    found = f"{count} x {first}"
    match = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _nvidia_smi())
    driver = (int(match[1]), int(match[2])) if match else None
    built = str(torch.values.get("built_for") or "")
    if not has_torch or torch.reason:
        return Row("GPU and driver", OK, found)
    if not built:
        fix = f"pip uninstall -y torch torchvision; {install('torch')} torchvision, from an index with CUDA builds"
        return Row("GPU and driver", COSTS, f"{found}; torch is a CPU build", "the GPU is not used", fix)
    if torch.values.get("usable"):
        return Row("GPU and driver", OK, f"{found}, CUDA {built}")
    if driver and driver[0] < int(built.split(".")[0]):
        costs = f"the driver knows CUDA up to {driver[0]}.{driver[1]}, torch is built for {built}: the GPU is not used"
        fix = f"update the driver to one of CUDA {built}, or install a torch built for CUDA {driver[0]}.x"
        return Row("GPU and driver", COSTS, found, costs, fix)
    fix = 'echo "$CUDA_VISIBLE_DEVICES"; python -c "import torch; torch.zeros(1).cuda()"  # says why'
    return Row("GPU and driver", COSTS, f"{found}; torch sees none", "the GPU is not used", fix)


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def library_row(name: str, torch: Probe, key: str, without: str) -> Row:
    """NCCL or cuDNN, which come with torch's CUDA build."""
    version = torch.values.get(key)
    if version and torch.values.get("built_for"):
        return Row(name, OK, str(version))
    return Row(name, COSTS, "not in this torch", without, install("torch") + ", a CUDA build")


def engine_row(told: Probe, torch: Probe) -> Row:
    """Transformer Engine: missing, there but broken, or usable."""
    version = installed("transformer-engine") or installed("transformer_engine")
    costs = "no FP8, slower attention and norms; training runs on torch's own"
    broken = f"{version}, does not load: {told.reason}"
    if not there("transformer_engine"):
        found = f"{version}, but no module" if version else "missing"
        return Row("transformer-engine", COSTS, found, costs, TE_INSTALL)
    if told.reason:
        parts = " ".join(f"transformer-engine{end}" for end in ("", "-cu12", "-cu13", "-torch"))
        return Row("transformer-engine", COSTS, broken, costs, f"pip uninstall -y {parts}; {TE_INSTALL}")
    capability = torch.values.get("capability")
    if capability and tuple(capability) < (8, 9):
        return Row("transformer-engine", COSTS, str(version), "this GPU has no FP8: Ada, Hopper or later ones do")
    return Row("transformer-engine", OK, str(version or told.values.get("version", "installed")))


def flash_row(told: Probe, engine: Row) -> Row:
    """flash-attn, a choice of Transformer Engine's beside cuDNN."""
    version = installed("flash-attn")
    fix = "pip install --no-build-isolation flash-attn"
    costs = "little: Transformer Engine has cuDNN's attention to choose from, too"
    if not there("flash_attn"):
        return Row("flash-attn", OK if engine.state == OK else COSTS, "missing", costs, fix)
    if told.reason:
        broken = "Transformer Engine and others that import it fail with it"
        fix = f"pip uninstall -y flash-attn; {fix}"
        return Row("flash-attn", COSTS, f"{version}, does not load: {told.reason}", broken, fix)
    return Row("flash-attn", OK, str(version or told.values.get("version", "installed")))


def apex_row(told: Probe) -> Row:
    """NVIDIA's Apex, which its repository and images have, or the other project of that name."""
    unneeded = "nothing: the fused optimizer is Transformer Engine's or torch's"
    spec = importlib.util.find_spec("apex") if there("apex") else None
    if spec is None:
        return Row("apex", OK, "missing", unneeded)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        costs = "not NVIDIA's Apex but another project of that name: imports of it may fail"
        found = f"{installed('apex') or 'installed'}, without apex.multi_tensor_apply"
        return Row("apex", COSTS, found, costs, "pip uninstall -y apex")
    if told.reason or not told.values.get("fused"):
        why = told.reason or "built without its CUDA extensions"
        return Row("apex", OK, f"NVIDIA's, of no use: {why}", unneeded)
    return Row("apex", OK, f"NVIDIA's {installed('apex') or ''}".strip())


def optional_row(package: str, costs: str, extra: str) -> Row:
    """A package that only some commands need."""
    version = installed(package)
    fix = "" if version else f"pip install -c {ROOT / 'constraints.txt'} -e '{ROOT}[{extra}]'"
    return Row(package, OK, version) if version else Row(package, COSTS, "missing", costs, fix)


def tokenizer_row(folder: str | None) -> Row:
    """tokenizer.json of the built-in models, and of `folder` where one is given."""
    built_in = (ROOT / "nvlm/data/tiny_tokenizer/tokenizer.json", ROOT / "nvlm/vision/tiny_encoder.safetensors")
    if lost := [str(path) for path in built_in if not path.is_file()]:
        found, costs = f"missing: {', '.join(lost)}", "the built-in models do not run"
        return Row("tokenizer files", COSTS, found, costs, f"git -C {ROOT} checkout .")
    if folder is None:
        return Row("tokenizer files", OK, "built-in ones; --tokenizer DIR looks at another")
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        vocabulary = json.loads(path.read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        costs = "llm.tokenizer cannot be read"
        fix = f"copy tokenizer.json of the language model into {path.parent}"
        return Row("tokenizer files", COSTS, f"{path}: {type(error).__name__}", costs, fix)
    return Row("tokenizer files", OK, f"{path}, {len(vocabulary)} tokens")


def memory_row(folder: str = "/dev/shm") -> Row:
    """Shared memory, through which loader workers hand their batches over."""
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return Row(folder, COSTS, "not there", "data.workers > 0 may fail", "data.workers=0")
    if size >= 1 * GB:
        return Row(folder, OK, f"{size / GB:.1f} GB")
    fix = "docker run --ipc=host ..., or --shm-size=16g; else data.workers=0"
    return Row(folder, COSTS, f"{size / GB:.2f} GB", "loader workers die of bus errors with data.workers > 0", fix)


def disk_row(folder: Path) -> Row:
    """Room where runs are written."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.0f} GB free in {folder}"
    if free >= 10 * GB:
        return Row("disk", OK, found)
    costs = "a checkpoint takes 14 bytes a parameter: the tiny models' 20 MB, a 72B's 1 TB"
    return Row("disk", COSTS, found, costs, "ln -s /A/LARGER/DISK runs")


def nvcc_row() -> Row:
    """The CUDA compiler."""
    path = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if os.path.isfile(path):
        return Row("nvcc", OK, path)
    costs = "Transformer Engine and flash-attn cannot be built from source; nothing else needs it"
    return Row("nvcc", COSTS, "missing", costs, "use the Dockerfile's image, or install the CUDA toolkit")


def examine(tokenizer: str | None = None, timeout: float = TIMEOUT) -> list[Row]:
    """All rows."""
    with ThreadPoolExecutor(4) as pool:
        wanted = [module for module in QUESTIONS if there(module.split(".")[0])]
        told = dict(zip(wanted, pool.map(lambda module: probe(module, timeout), wanted)))
    nothing = Probe({})
    torch = told.get("torch", nothing)
    engine = engine_row(told.get("transformer_engine.pytorch", nothing), torch)
    packages = [package_row(name, specifier, told) for name, specifier in requirements().items()]
    return [
        python_row(),
        *packages,
        gpu_row(torch, "torch" in told),
        library_row("NCCL", torch, "nccl", "no training on several GPUs; gloo on the CPU"),
        library_row("cuDNN", torch, "cudnn", "no fused attention on a GPU"),
        engine,
        flash_row(told.get("flash_attn", nothing), engine),
        apex_row(told.get("apex", nothing)),
        optional_row("transformers", "nothing in training; tests and some benchmarks compare with it", "test"),
        optional_row("hydra-submitit-launcher", "no sweeps through Slurm (hydra/launcher=slurm)", "slurm"),
        tokenizer_row(tokenizer),
        memory_row(),
        nvcc_row(),
        disk_row(Path.cwd()),
    ]


def guarded(make: Callable[[], list[Row]]) -> list[Row]:
    """A doctor must not fall ill: what nobody thought of is a row, too."""
    try:
        return make()
    except Exception as error:
        return [Row("doctor", STOPS, f"{type(error).__name__}: {error}", "it could not look", "report this line")]


def table(rows: list[Row]) -> str:
    """For a terminal."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:5}  {row.name:{width}}  {row.found}")
        below = (("costs", row.costs), ("fix", row.fix))
        lines += [f"{'':{width + 7}}  {what}: {text}" for what, text in below if text]
    stops = [row.name for row in rows if row.state == STOPS]
    lines.append(f"training is impossible: {', '.join(stops)}" if stops else "training is possible")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the table; 0 where training is possible, else 1."""
    parser = argparse.ArgumentParser(prog="python -m nvlm.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", metavar="DIR", help="also look at this folder's tokenizer.json")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a package's import")
    options = parser.parse_args(arguments)
    rows = guarded(lambda: examine(options.tokenizer, options.timeout))
    print(table(rows))
    return int(any(row.state == STOPS for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
