"""The gRPC services: generation, administration, JetStream's protocol; errors as status codes."""
