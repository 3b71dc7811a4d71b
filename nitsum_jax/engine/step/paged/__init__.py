"""Attention over the paged pool as kernels of Pallas; see docs/inside/attention.md."""
