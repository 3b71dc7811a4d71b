"""Calls of the Python API: what they may ask for, the engine's requests, and the answers."""
