"""One thread for each process: the tensors here are small, and the ranks that tests start share the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process that tests start

import support.shapes  # noqa: F401  jaxtyping looks for it in `support`, and does not import it
