"""Imported once, by the server of `faults_runs.warm_server`: everything loaded and compiled, on one thread.

A fork inherits no thread but its own, so there may be no other: no OpenMP team, no inductor workers.
"""

import os
import tempfile
from pathlib import Path

import torch

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as _folder:
    _source, _megatron = os.environ["FAULTS_CHECKPOINT"], str(Path(_folder, "megatron"))
    import_checkpoint(ImportJob(_source, _megatron))
    export_checkpoint(ExportJob(_megatron, str(Path(_folder, "untouched")), source=_source))
    export_checkpoint(ExportJob(_megatron, str(Path(_folder, "fresh")), scales="fresh", source=_source))
