"""Trainings on several processes are made once per module: one worker of pytest-xdist has all of a module's tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE = 900  # seconds; a module's trainings are its first test's, and take three minutes alone on two slow cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Mark each module as a group, for ``--dist loadgroup``, and give its trainings time."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
            item.add_marker(pytest.mark.timeout(PATIENCE))
