"""F. Innocenti and others, *JPC: Flexible Inference for Predictive Coding Networks in JAX*,
arXiv:2412.03676 (2024): the classifier of its tutorial.
"""
