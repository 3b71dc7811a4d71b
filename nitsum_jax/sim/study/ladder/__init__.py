"""The ladder: what can be deployed today, then this project's parts one by one, from half to four times the load."""
