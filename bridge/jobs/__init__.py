"""Work by many processes that may be killed at any moment."""
