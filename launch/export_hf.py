"""Export: `python launch/export_hf.py checkpoint=runs/NAME out=DIR` writes a trained model in NVLM-D-72B's format.

Needs no GPU. `--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
