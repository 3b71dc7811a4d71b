"""The network: gRPC and HTTP services, security, operation, the launcher and the clients.  Nothing else."""
