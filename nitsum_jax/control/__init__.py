"""The room of policy: latency tiers, and what is decided from them.

Pure by rule: no JAX, no clock, no input or output.  Time and observations come in as arguments and decisions go out as
values, so the same objects run in the live server and in a simulation, and a decision can be replayed from a log.  It
imports only the standard library, numpy, scipy, `nitsum_jax.errors` and the pure modules `layout` and `vshards` of
`nitsum_jax.meshes`.
"""
