"""Fast modules with the semantics of `reference`; may import its constants and configs, knows nothing of Megatron or files."""
