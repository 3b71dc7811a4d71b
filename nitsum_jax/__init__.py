"""nitsum-jax: a JAX serving runtime in which tensor parallelism is a runtime control, not a deployment choice.

Rooms, each importing only what stands below it: server; engine, control; models; meshes.  See docs/ARCHITECTURE.md.
This file imports nothing, so that the pure rooms load without JAX.
"""

__version__ = "0.1.0"
