"""Inspect: `python launch/inspect_data.py data=jsonl data.path=records.jsonl` shows what the model will see.

It counts records, tokens, tiles and faults by source, and writes a page for people and a report for programs. Needs no
GPU and no weights. `--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
