"""gRPC service, launcher and client: the room that drives an engine with real time."""
