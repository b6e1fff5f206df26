"""Training with megatron-core: the thin driver behind `minimax-m2 train`, each part usable in a loop of your own."""
