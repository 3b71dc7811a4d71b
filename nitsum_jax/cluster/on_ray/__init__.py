"""Ray around the cells: deployment, calls and routing by Ray Serve."""
