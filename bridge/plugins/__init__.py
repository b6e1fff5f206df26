"""MiniMax-M2 inside other training frameworks: a module for each host, imported by name, and by nothing of ours."""
