"""megatron-core beside an nvidia-resiliency-ext that is too old for its asynchronous saving: it then saves by itself.

megatron-core 0.19 wants 0.6, megatron-bridge's training imports another part, and the registry's newest was 0.4.1.
Import this before megatron-core, which otherwise fails over the version.
"""

import sys

sys.modules["nvidia_resiliency_ext.checkpointing"] = None  # type: ignore[assignment]  # so that its import is an ImportError
