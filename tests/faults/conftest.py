"""One house for all fault tests: its processes are started once, and whatever a test broke is put right before the next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from support.history import Readers
from support.house import House


@pytest.fixture(scope="session")
def one_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture
def house(one_house: House) -> Iterator[House]:
    one_house.restore()
    yield one_house
    one_house.dismiss()


@pytest.fixture
async def readers(house: House) -> AsyncIterator[Readers]:
    async with Readers(house.urls, house.key("client")) as readers:
        yield readers
