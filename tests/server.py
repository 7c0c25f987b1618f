"""The fork server of the tests' processes, with their imports done, so that a process starts in a fraction of a second.

Python has one such server per pytest process, whichever context asks for it.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys

from nvlm.processes.workers import die_with_parent

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.server"])
FIRST = os.environ.get("NVLM_TEST_PRELOAD", "").split()
OURS = (
    "tests.e2e.preloaded", "tests.dist.layouts", "tests.dist.checkpoints", "nvlm.data.sources.pages",
    "nvlm.evaluate.during",
    "nvlm.export.export", "nvlm.export.modeling_nvlm",
    *(f"nvlm.arch.{arch}.{part}" for arch in ("decoder", "xattn", "hybrid") for part in ("placement", "model")),
)  # fmt: skip
LATE = (
    "pytest", "datasets.io", "scipy.io", "scipy.sparse", "megatron.core.models.mimo",
    "megatron.core.transformer.moe.moe_layer", "megatron.core.transformer.multi_token_prediction",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
)  # fmt: skip
"""What the libraries import once a run has begun: a second for each process."""

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # not where a test imports it
    # Killed with the tests that started it. Left to itself it notices their end, and then takes seconds to take torch
    # and Megatron apart.
    die_with_parent(os.getppid())
    for name in (*FIRST, *OURS, *LATE):
        importlib.import_module(name)
    gc.freeze()  # else each process walks through all that was imported, and copies it, whenever it collects garbage
