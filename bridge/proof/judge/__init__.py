"""A judge: anybody's megatron-core layers, run on real ranks and compared with the reference, gradients included."""
