"""What fork servers of the tests import first, so that a server is killed with the tests that started it. Left to
itself it notices their end, and then takes seconds to take torch and Megatron apart."""

from __future__ import annotations

import os
import sys

from nvlm.processes.workers import die_with_parent

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # not where a test imports it
    die_with_parent(os.getppid())
