"""Who changes the layout of a live cell: the control loop, the planner's process, and what was decided."""
