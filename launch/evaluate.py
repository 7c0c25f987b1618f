"""Evaluate: `python launch/evaluate.py answers=FILE.jsonl metric=NAME` scores a file of answers.
`--help` lists the keys."""

from __future__ import annotations

import sys

from nvlm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
