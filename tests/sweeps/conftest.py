"""Every test gives the folders back that it opened."""

import pytest
from support import sweeps


@pytest.fixture(autouse=True)
def closed_stores():
    yield
    while sweeps.OPENED:
        sweeps.OPENED.pop().close()
