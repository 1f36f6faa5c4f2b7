"""Timing of the ops on shapes of one's own: `workloads` says what is timed, `timing` how.

`sgl-vlm bench` and the scripts in benchmarks/ share both.
"""
