"""Plug-ins: this model and its checkpoints inside other trainers, one file a host; importing one registers it there."""
