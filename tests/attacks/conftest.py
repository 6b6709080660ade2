"""What tests of attacks share: a disk full of somebody's own files, made once a file and copied for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.world import World, another, make_world


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "home", llama)


@pytest.fixture
def world(first: World, tmp_path: Path) -> World:
    return another(first, tmp_path / "home")
