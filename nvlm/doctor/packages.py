"""Rows about Python and its packages."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from nvlm.config.values import TE_INSTALL
from nvlm.doctor.probe import Probe, findable
from nvlm.doctor.rows import COSTS, OK, STOPS, Row
from nvlm.doctor.versions import ROOT, install, installed, pinned, satisfies

# Import names that differ from the package's name.
MODULES = {
    "hydra-core": "hydra",
    "Jinja2": "jinja2",
    "megatron-core": "megatron.core",
    "pillow": "PIL",
    "PyYAML": "yaml",
}
COSTS_OF = {
    "psutil": "Megatron's checkpoints hang without it",
    "pillow": "images cannot be read",
    "torch": "nothing runs",
    "megatron-core": "no model can be built",
}


def python_row() -> Row:
    """The interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if not satisfies(found, ">=3.12"):
        return Row("Python", STOPS, found, "Megatron-Core needs 3.12 or later", "python3.12 -m venv .venv")
    return Row("Python", OK, found)


def package_row(package: str, specifier: str, probes: Mapping[str, Probe]) -> Row:
    """A package that setup.py requires."""
    module = MODULES.get(package, package)
    version = installed(package) or (str(probes[module].values.get("version", "")) if module in probes else "")
    fix, costs = install(f"{package}{specifier}"), COSTS_OF.get(package, "training does not start")
    if not findable(module.split(".")[0]):
        return Row(package, STOPS, f"{version}, but no module {module}" if version else "missing", costs, fix)
    if reason := probes[module].reason if module in probes else "":
        found = f"{version or 'installed'}, does not load: {reason}"
        return Row(package, STOPS, found, costs, f"{fix} --force-reinstall --no-deps")
    if version and not satisfies(version, specifier):
        return Row(package, STOPS, f"{version}, {specifier} is required", "the trainer needs another version", fix)
    pin = pinned().get(package)
    if package == "pillow" and pin and version != pin:
        costs = f"tiles differ by a few levels from those of {pin}, the tested version"
        return Row(package, COSTS, version, costs, install(f"pillow=={pin}"))
    return Row(package, OK, version or "installed")


def engine_row(probe: Probe, torch: Probe) -> Row:
    """Transformer Engine: missing, broken, or usable."""
    version = installed("transformer-engine") or installed("transformer_engine")
    costs = "no FP8, slower attention and norms; training uses torch's instead"
    broken = f"{version}, does not load: {probe.reason}"
    if not findable("transformer_engine"):
        found = f"{version}, but no module" if version else "missing"
        return Row("transformer-engine", COSTS, found, costs, TE_INSTALL)
    if probe.reason:
        parts = " ".join(f"transformer-engine{end}" for end in ("", "-cu12", "-cu13", "-torch"))
        return Row("transformer-engine", COSTS, broken, costs, f"pip uninstall -y {parts}; {TE_INSTALL}")
    capability = torch.values.get("capability")
    if capability and tuple(capability) < (8, 9):
        return Row("transformer-engine", COSTS, str(version), "this GPU has no FP8: Ada, Hopper or later ones do")
    return Row("transformer-engine", OK, str(version or probe.values.get("version", "installed")))


def flash_row(probe: Probe, engine: Row) -> Row:
    """flash-attn, which Transformer Engine can use instead of cuDNN."""
    version = installed("flash-attn")
    fix = "pip install --no-build-isolation flash-attn"
    costs = "little: Transformer Engine can use cuDNN's attention instead"
    if not findable("flash_attn"):
        return Row("flash-attn", OK if engine.state == OK else COSTS, "missing", costs, fix)
    if probe.reason:
        broken = "packages that import it, such as Transformer Engine, fail too"
        fix = f"pip uninstall -y flash-attn; {fix}"
        return Row("flash-attn", COSTS, f"{version}, does not load: {probe.reason}", broken, fix)
    return Row("flash-attn", OK, str(version or probe.values.get("version", "installed")))


def apex_row(probe: Probe) -> Row:
    """NVIDIA's Apex, from its repository or images; PyPI has another project of that name."""
    unneeded = "nothing: the fused optimizer is Transformer Engine's or torch's"
    spec = importlib.util.find_spec("apex") if findable("apex") else None
    if spec is None:
        return Row("apex", OK, "missing", unneeded)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        costs = "not NVIDIA's Apex but another project of that name: imports of it may fail"
        found = f"{installed('apex') or 'installed'}, without apex.multi_tensor_apply"
        return Row("apex", COSTS, found, costs, "pip uninstall -y apex")
    if probe.reason or not probe.values.get("fused"):
        why = probe.reason or "built without its CUDA extensions"
        return Row("apex", OK, f"NVIDIA's, unusable: {why}", unneeded)
    return Row("apex", OK, f"NVIDIA's {installed('apex') or ''}".strip())


def optional_row(package: str, costs: str, extra: str) -> Row:
    """A package that only some commands need."""
    version = installed(package)
    fix = "" if version else f"pip install -c {ROOT / 'constraints.txt'} -e '{ROOT}[{extra}]'"
    return Row(package, OK, version) if version else Row(package, COSTS, "missing", costs, fix)
