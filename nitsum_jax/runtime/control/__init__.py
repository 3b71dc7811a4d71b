"""What changes the layout of a live cell: the control loop, the planner's process, and the log of decisions."""
