from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.web.served import served


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The page of the tiny pair, served by the command."""
    with served() as (address, _):
        yield address
