"""What the library asks of the system: here, memory that is kept."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from bnn_utils.system import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    """A tensor of 64 MiB takes new pages each time, unless they are kept (after some first gaps in the heap)."""
    left, kept = (
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, check=True).stdout)
        for how in ("leave", "keep")
    )
    assert kept < left / 2
