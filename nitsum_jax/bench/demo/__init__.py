"""nitsum-bench demo: adaptive tensor parallelism against static layouts, live in a paced cell."""
