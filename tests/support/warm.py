"""Imported once by the server that tests fork from: FP8 is compiled, by conversions that use all of it."""

import gc
import tempfile
from pathlib import Path

import torch

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.huggingface.random_checkpoint import make_checkpoint
from support.checkpoints import EDGY_CONFIG

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as _folder:
    _source, _megatron, _out = (str(Path(_folder, name)) for name in ("source", "megatron", "out"))
    make_checkpoint(Path(_source), EDGY_CONFIG, mtp_layers=1)
    import_checkpoint(ImportJob(_source, _megatron))
    export_checkpoint(ExportJob(_megatron, _out, source=_source))
    export_checkpoint(ExportJob(_megatron, _out, scales="fresh", source=_source), overwrite=True)

gc.collect()
gc.freeze()  # megatron-core collects garbage at every save, and would look through all of the above in each fork
