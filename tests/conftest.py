"""One thread for every test: processes that each take all cores spend their time waiting for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import torch  # noqa: E402 - the thread count must be set first

torch.set_num_threads(1)
