"""Generate text: `python launch/generate.py checkpoint=runs/NAME image=PAGE.png prompt="What is this?"`.

Starts its own workers if the layout has several ranks, or runs as a task of torchrun or srun. `--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
