"""Rules about structure: the direction of imports, and what only one place may know."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[2]


ROOMS = (
    "tiling", "config", "runs", "processes", "metrics", "data", "tasks", "weights", "attention", "llm", "vision",
    "arch", "inputs", "estimate", "export", "train", "generate", "inspect", "explain", "evaluate", "lmms", "sweep",
    "report", "commands",
)  # fmt: skip
"""From the ground up: a room imports only rooms before it."""

NO_TORCH = ("torch", "megatron", "hydra")
VISION_MODULES = ("nvlm.vision.path", "nvlm.vision.prepass", "nvlm.vision.quantize", "nvlm.vision.pooling")
NAMES = ("decoder", "xattn", "hybrid")
NO_ARCHITECTURE = tuple(f"nvlm.arch.{name}" for name in NAMES)


def imports(where: str) -> dict[str, set[str]]:
    """Modules imported anywhere in each file of the folder, or in the one file, nvlm/`where`."""
    found = {}
    for path in [*(ROOT / "nvlm" / where).rglob("*.py"), *(ROOT / "nvlm").glob(f"{where}.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[str(path.relative_to(ROOT))] = names
    assert found
    return found


def test_every_folder_is_a_package():
    """setuptools leaves out folders without an __init__.py, so that only an editable install would have them."""
    folders = {path.parent for path in (ROOT / "nvlm").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_every_module_is_in_a_room():
    folders = {path.name for path in (ROOT / "nvlm").iterdir() if path.is_dir() and path.name != "__pycache__"}
    # The doctor is what a user runs where nothing else can be imported: python -m nvlm.doctor.
    assert folders == {*ROOMS, "doctor"}
    assert {path.name for path in (ROOT / "nvlm").glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_goes_up(room):
    above = tuple(f"nvlm.{other}" for other in ROOMS[ROOMS.index(room) + 1 :])
    for path, names in imports(room).items():
        up = [name for name in names if ".".join(name.split(".")[:2]) in above]
        assert not up, f"{path} imports {up}"


@pytest.mark.parametrize(
    ("where", "never"),
    [
        ("tiling", ("megatron", "torch.distributed")),
        ("config", NO_TORCH),
        ("metrics", NO_TORCH),
        ("tasks", NO_TORCH),
        ("sweep", ("torch", "megatron")),
        ("report", ("torch", "megatron")),
        ("runs/folder", NO_TORCH),
        ("runs/ownership", NO_TORCH),
        ("runs/files", NO_TORCH),
        ("processes/workers", NO_TORCH),
        ("processes/launchers", NO_TORCH),
        ("processes/requeue", (*NO_TORCH, "submitit")),
        ("data", ("megatron", "torch.distributed")),
        ("data/amounts", NO_TORCH),
        ("data/outline", NO_TORCH),
        ("data/text", NO_TORCH),
        ("data/forms", NO_TORCH),
        ("data/sources", NO_TORCH),
        ("data/order", NO_TORCH),
        ("data/blend", NO_TORCH),
        ("data/look", NO_TORCH),
        ("data/measure", NO_TORCH),
        ("data/index", NO_TORCH),
        ("attention/choice", NO_TORCH),
        ("weights", ("megatron",)),
        ("inputs", NO_TORCH),
        ("vision/source", NO_TORCH),
        ("vision/encoders/interface", NO_TORCH),
        ("vision/encoders/registry", NO_TORCH),
        ("vision", ("nvlm.data.loader", "nvlm.data.sources", "nvlm.data.samples")),
        ("llm", ("nvlm.data.loader", "nvlm.data.sources", "nvlm.data.samples")),
        ("arch/registry", NO_TORCH),
        ("arch/description", NO_TORCH),
        *((f"arch/{name}/{part}", NO_TORCH) for name in NAMES for part in ("description", "placement")),
        ("arch/decoder", ("nvlm.arch.xattn", "nvlm.arch.hybrid")),
        ("arch/xattn", ("nvlm.arch.decoder", "nvlm.arch.hybrid")),
        ("estimate", ("torch", "megatron", "nvlm.arch.base", "nvlm.arch.pipeline", "nvlm.llm", "nvlm.vision.path")),
        ("export", ("megatron", "nvlm.arch.base", "nvlm.llm", *VISION_MODULES)),
        ("export/modeling_nvlm", ("nvlm", "megatron", "transformers")),
        ("train", NO_ARCHITECTURE),
        ("generate", NO_ARCHITECTURE),
        ("evaluate", NO_ARCHITECTURE),
        ("inspect", ("megatron", "nvlm.arch.base", "nvlm.llm", "nvlm.train", *VISION_MODULES)),
        ("commands/compose", ("torch", "megatron")),
        ("commands/stages", ("torch", "megatron")),
        ("commands/train", ("torch", "megatron")),
        ("commands/prepare", ("torch", "megatron")),
        ("doctor", (*NO_TORCH, "omegaconf", "numpy")),
    ],
)
def test_what_a_room_does_without(where, never):
    for path, names in imports(where).items():
        for name in names:
            assert not any(name == other or name.startswith(f"{other}.") for other in never), f"{path} imports {name}"


def test_an_encoder_is_known_to_its_own_folder_alone():
    """The exported single file has its own copy of the modules; a run folder that names no encoder means the first
    one."""
    own, default = ROOT / "nvlm/vision/encoders", '"vision": {"encoder": "internvit", '
    for path in (ROOT / "nvlm").rglob("*.py"):
        if own not in path.parents and path.name != "modeling_nvlm.py":
            lines = [line for line in path.read_text().splitlines() if "internvit" in line.lower()]
            assert not [line for line in lines if default not in line], f"{path}: {lines}"


def test_what_is_known_of_an_encoder_needs_no_torch():
    descriptions = list((ROOT / "nvlm/vision/encoders").glob("*/description.py"))
    assert descriptions
    code = (
        "import sys; import nvlm.vision.source; from nvlm.vision.encoders.registry import ENCODERS\n"
        f"assert len(ENCODERS) == {len(descriptions)} and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


KNOWS_ARCHITECTURES = ("description", "placement_rule")  # nvlm.arch.registry's, which take a name
NO_NAMES = ("decoder", "hybrid")  # "xattn" is a module group, too


def dispatches(code: str) -> list[str]:
    """Where `code` chooses by an architecture's name: it compares one, looks something up by it, or writes it down."""
    tree = ast.parse(code)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in NO_NAMES]
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_name(node)]
    return [ast.unparse(parents[node]) for node in [*found, *(n for n in names if not is_told(n, parents[n]))]]


def is_name(node: ast.AST) -> bool:
    """Whether it is `arch.name`, of whatever configuration."""
    if not isinstance(node, ast.Attribute) or node.attr != "name":
        return False
    return getattr(node.value, "attr", getattr(node.value, "id", "")) == "arch"


def is_told(node: ast.AST, parent: ast.AST) -> bool:
    """Whether the name is only handed to the registry, put into a text or a file, or compared with another run's."""
    if isinstance(parent, ast.Call):
        return getattr(parent.func, "attr", getattr(parent.func, "id", "")) in KNOWS_ARCHITECTURES
    if isinstance(parent, ast.Compare):
        others = [one for one in (parent.left, *parent.comparators) if one is not node]
        return not any(
            isinstance(part, ast.Constant) and part.value in NAMES for one in others for part in ast.walk(one)
        )
    return isinstance(parent, ast.FormattedValue) or (isinstance(parent, ast.Dict) and node in parent.values)


def test_nothing_outside_its_room_chooses_by_an_architecture_s_name():
    """What depends on the architecture is a field of nvlm.arch.description.Description."""
    elsewhere = {"llm/backend.py": ["hybrid"], "commands/compose.py": ["_root_"]}
    for path in (ROOT / "nvlm").rglob("*.py"):
        place = str(path.relative_to(ROOT / "nvlm"))
        if place.startswith("arch/") or place == "export/modeling_nvlm.py":  # which is self-contained in an export
            continue
        wrong = [text for text in dispatches(path.read_text()) if not any(w in text for w in elsewhere.get(place, ()))]
        assert not wrong, f"{place}: {wrong}"


@pytest.mark.parametrize(
    "code",
    [
        "keys = 0 if config.arch.name == 'xattn' else 2",
        "keys = {'xattn': 1}[config.arch.name]",
        "keys = table.get(arch.name)",
        "name = config.arch.name",
        "match config.arch.name:\n    case 'xattn': pass",
        "cross = arch in ('xattn', 'hybrid')",
    ],
)
def test_a_choice_by_name_is_seen(code):
    assert dispatches(code)


def test_only_device_speaks_of_cuda():
    for path in (ROOT / "nvlm").rglob("*.py"):
        code = [line.split("#")[0] for line in path.read_text().splitlines()]
        words = [line for line in code if "torch.cuda" in line or '"cuda"' in line]
        assert not words or path.name == "device.py", f"{path}: {words}"


def test_the_cpu_answers_for_cuda_only_where_there_is_none():
    code = (
        "import torch; from nvlm.processes import device\n"
        "asked = torch.cuda.current_device\n"
        "device.has_cuda = lambda: True\n"
        "torch.cuda.set_device = lambda rank: None\n"
        "device.device = lambda: 'a gpu'\n"
        "assert device.prepare() == 'a gpu' and not device._CpuAnswersForCuda.active\n"
        "assert torch.cuda.current_device is asked\n"
        "device.has_cuda = lambda: False\n"
        "device.device = lambda: 'the cpu'\n"
        "assert device.prepare() == 'the cpu' and device._CpuAnswersForCuda.active\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_architecture_is_known_without_its_code():
    """A loader worker that unpickles a placement rule must not pull in Megatron, nor the launcher torch."""
    code = (
        "import sys; from nvlm.arch import registry\n"
        f"for name in {NAMES}: registry.placement_rule(name), registry.description(name)\n"
        "assert not any(m.startswith(('torch', 'megatron')) for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unit_tests_lie_in_rooms():
    tests = (ROOT / "tests" / "unit").glob("*/test_*.py")
    assert {path.parent.name for path in tests} <= set(ROOMS)


def test_the_longest_files_are_there():
    assert not [file for file in LONGEST if not (ROOT / file).is_file()]


def test_no_test_module_is_a_library():
    """What several test modules need is in a helper module with a descriptive name."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [alias.name for alias in node.names]
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], path


def test_pytest_looks_into_every_folder_of_tests():
    """By default pytest silently skips any folder called dist."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert {"tests", "unit", "parity", "dist", "e2e"} <= folders
    assert not [name for name in folders for pattern in settings["norecursedirs"] if fnmatch(name, pattern)]
