"""nitsum-bench compile: what the compilers of accelerators make of a step, without the accelerators."""
