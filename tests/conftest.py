"""What every test relies on: no network, and generated data in a folder of the test run."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(scope="session", autouse=True)
def _data_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PRUNEVAL_DATA"] = str(tmp_path_factory.mktemp("data"))
