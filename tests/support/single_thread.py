"""Imported first by what becomes a server of forks, before torch reads the environment.

A fork inherits no thread but its own, so there may be no other: no OpenMP team, no inductor workers. CUDA does not
survive a fork either.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
