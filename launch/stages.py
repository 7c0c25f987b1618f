"""Stages: `python launch/stages.py +pipeline=llava_ov_7b` trains the stages of conf/pipeline/llava_ov_7b.yaml in turn.

Each starts from the checkpoint of the one before it. What is done is shown first and passed over, so the same command
goes on where it ended. Other words are as for launch/train.py; stages.NAME.KEY=VALUE is for one stage.
"""

from __future__ import annotations

import sys
import time

STARTED = time.time()

from nvlm.commands.train import chain  # noqa: E402

if __name__ == "__main__":
    sys.exit(chain(STARTED))
