"""Evidence that nothing was lost: bytes compared with bytes, logits with the reference's."""
