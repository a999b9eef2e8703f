"""What holds for every test: one thread, as processes that each take all cores wait for each other; Ctrl-C is heard;
no test fails for being slow.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402 - the thread count must be set first

# how long an example takes says how busy the machine is
hypothesis.settings.register_profile("gcalib", deadline=None)
hypothesis.settings.load_profile("gcalib")

torch.set_num_threads(1)

# What a script starts in the background is told to ignore Ctrl-C, and would tell every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
