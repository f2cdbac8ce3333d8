"""How fast and how lean torch2pc is: ``python -m benchmarks`` measures, prints and saves it.

- `nets`: the networks and batches that are measured;
- `steps`: what is timed: backprop, the floor of Strict, and PCInfer;
- `timing`: how: alternated runs and the ratios between them;
- `speed`, `memory`, `scaling`: parts of the run, one table or plot each;
- `largest`: the largest model on a GPU, by a formula held against measured peaks;
- `distributed`: training on several processes, a program of its own, started by
  ``python -m torch.distributed.run --nproc-per-node=2 -m benchmarks.distributed``;
- `peers`: the same training step in other predictive coding packages, a program of its own:
  ``python -m benchmarks.peers``;
- `report`: tables and files.

Tests of what the code computes are in ``tests``; nothing there depends on time.
"""
