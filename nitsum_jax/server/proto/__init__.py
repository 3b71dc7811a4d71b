"""The wire format: nitsum.proto and the modules generated from it (`python -m nitsum_jax.server.proto.generate`)."""
