"""The tiny model as a fixture."""

from __future__ import annotations

import pytest

from flamingo_kernels import FlamingoModel
from testing.tiny_model import make_model


@pytest.fixture
def model() -> FlamingoModel:
    return make_model()
