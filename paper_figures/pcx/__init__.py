"""L. Pinchetti and others, *Benchmarking Predictive Coding Networks -- Made Simple*,
arXiv:2407.01163 (2024): the multi-layer perceptrons of its benchmark.
"""
