"""How fast and how lean torch2pc is: ``python -m benchmarks`` measures, prints and saves it.

- `nets`: the networks and batches that are measured;
- `steps`: what is timed: backprop, the floor of Strict, and PCInfer;
- `timing`: how: alternated runs and the ratios between them;
- `speed`, `memory`, `scaling`: the three parts of the run, one table or plot each;
- `peers`: the same training step in other predictive coding packages, a program of its own:
  ``python -m benchmarks.peers``;
- `report`: tables and files.

Tests of what the code computes are in ``tests``; nothing there depends on time.
"""
