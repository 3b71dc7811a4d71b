"""Prometheus metrics: what is counted, and how it is served."""
