"""One thread for every test and what it starts: the networks are tiny, and idle threads would only wait in the way."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
