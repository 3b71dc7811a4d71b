"""nitsum-serve: flags, ports, start and end of the process."""
