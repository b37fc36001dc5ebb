"""A tiny model that all tests of this folder share."""

from __future__ import annotations

import pytest

from . import helpers


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return helpers.write_model(tmp_path_factory.mktemp("model"))
