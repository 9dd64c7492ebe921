"""One server for the tests of a file, which must leave nothing behind in it."""

from collections.abc import Iterator

import pytest

from tests.server.serving import Running, running


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    with running() as it:
        yield it


@pytest.fixture
def server(_shared: Running) -> Iterator[Running]:
    yield _shared
    _shared.model.gate.set()
    _shared.model.script = []
    _shared.rest()
