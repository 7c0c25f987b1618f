"""Prepare: `python launch/prepare.py data.index=DIR data=jsonl data.path=FILE ...` reads all records once and writes an
index of them, from which a run with the same keys starts and plans its steps at once. `--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
