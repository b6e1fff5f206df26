"""Whole checkpoints from one format to the other, without a model or a GPU."""
