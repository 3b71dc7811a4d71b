"""The tools that call a server: nitsum-generate and nitsum-admin."""
