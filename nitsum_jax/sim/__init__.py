"""A cell simulated event by event: workloads, baselines, logs and reports, driven by the policies of control/."""
