"""The folder of records that the tests of inspection share."""

from __future__ import annotations

import pytest

from tests.unit.inspect.records import written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    written(folder)
    return folder
