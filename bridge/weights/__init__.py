"""Weights into and out of a running model, at any parallel layout."""
