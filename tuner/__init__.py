"""Measures the tiles of schedules on the machine at hand, and leaves records that the next compile uses.

tasks.py says what there is to tune in a model, problems.py what a task computes, candidates.py compiles a tile,
measuring.py runs and times it in a process of its own, search.py says what to try next, sweep.py puts them together.
A folder of its own, since it needs schedules and runtime both, which don't know each other.
"""
