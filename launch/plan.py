"""Plan: `python launch/plan.py gpus=64 gpu=h100 arch=hybrid llm=qwen2-72b` lists the layouts that fit, fastest first.

It also says why the others do not fit. Needs no GPU, no weights and no torch. `--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
