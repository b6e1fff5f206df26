"""megatron-core's distributed checkpoint (`torch_dist`) on disk, read and written without a model."""
