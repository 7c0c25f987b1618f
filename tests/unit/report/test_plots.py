"""Charts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nvlm.report.plots import Line, Panel, draw

WIDTH = 331  # units of a panel


@pytest.mark.parametrize("label", ["1d", "optim.lr=0.001", "data.sources.text.weight=0.0001, arch.bind_tags=none"])
def test_a_label_stands_beside_its_line_and_within_the_panel(label):
    curve = np.array([0.0, 10.0]), np.array([0.0, 1.0])
    svg = draw(Panel("loss", (Line(label, 0, (curve,), curve),), "steps", (0.0, 1.0)), 0)
    (shown,) = [text for text in re.findall(r"<text[^>]*>[^<]*</text>", svg) if label[-6:] in text or label in text]
    left = float(re.search(r' x="([\d.]+)"', shown)[1])
    letters = len(re.search(r">([^<]*)<", shown)[1])
    assert left + 5.5 * letters <= WIDTH and left > WIDTH / 3
