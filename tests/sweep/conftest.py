"""Every test gives the folders back that it opened."""

import made
import pytest


@pytest.fixture(autouse=True)
def closed_stores():
    yield
    while made.OPENED:
        made.OPENED.pop().close()
