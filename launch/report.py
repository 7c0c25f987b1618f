"""Report: `python launch/report.py runs=runs/sweep` compares runs on one page.

It has scores with intervals, paired differences, curves, costs and answers. Needs no GPU, no weights and no torch.
`--help` lists the keys.
"""

from __future__ import annotations

import sys

from nvlm.commands.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
