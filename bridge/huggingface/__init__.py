"""A Hugging Face checkpoint on disk: its files, read and written."""
