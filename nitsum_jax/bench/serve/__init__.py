"""An open-loop load generator over gRPC: a workload as it comes, whatever the server does with it."""
