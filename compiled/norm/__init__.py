"""The norms: over all query heads, over all key heads, and over the hidden size."""
