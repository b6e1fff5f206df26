"""Imported once by the server of `test_save`: a live model, loaded, on one thread, one rank alone."""

import os

import torch

from bridge import MiniMaxM2Bridge
from bridge.model.process_groups import model_parallel

torch.set_num_threads(1)
_groups = model_parallel()
_groups.__enter__()  # for as long as the server lives
bridge = MiniMaxM2Bridge.from_hf_pretrained(os.environ["WARM_MODEL_CHECKPOINT"])
model = bridge.to_megatron_model()
for _ in bridge.export_hf_weights(model, "fp8"):  # compiles
    pass
