"""Imported first by what becomes a server of forks, before torch reads the environment.

A fork inherits no thread but its own, so there may be no other: no OpenMP team, no inductor workers. CUDA does not
survive a fork either. What inductor compiled for processes of more threads is in another folder: torch before 2.12
takes it for one thread too, and a fork then waits for a team that is not there.
"""

import os
import tempfile

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"torchinductor_one_thread_{os.getuid()}"),
    "CUDA_VISIBLE_DEVICES": "",
}
