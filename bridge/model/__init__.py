"""MiniMax-M2 as a megatron-core model: its modules, its layer specs and its configuration."""
