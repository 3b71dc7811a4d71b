"""What operators look at: metrics, logs, traces, the dashboard, and the routes that show them."""
