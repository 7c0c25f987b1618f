"""Train: `python launch/train.py [arch=hybrid] [llm=tiny] ...`; `-m` sweeps over comma lists, side by side.

Starts its own workers, or runs as a task of torchrun or srun. `--help` lists the configuration groups.
"""

from __future__ import annotations

import sys
import time

STARTED = time.time()

from nvlm.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(STARTED))
