"""Text, conversations and token ids, as sequences that megatron-core's `GPTDataset` gives out."""
