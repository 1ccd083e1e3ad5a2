"""One thread for every test and what it starts: the networks are tiny, and idle threads would only wait in the way."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item):
    if os.name == "nt" and item.get_closest_marker("posix"):
        pytest.skip("on Windows processes are neither forked nor sent signals")
