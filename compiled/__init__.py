"""Fast modules with the semantics of `reference`; they import its constants and configs, no Megatron and no files."""
