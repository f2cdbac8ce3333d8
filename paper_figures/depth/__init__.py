"""How deep predictive coding learns: J. Seely and J. Gould, *Augmented Lagrangian Predictive Coding*,
arXiv:2605.31022 (2026), and F. Innocenti and others, *muPC: Scaling Predictive Coding to 100+ Layer
Networks*, arXiv:2505.13124 (2025), beside this library's other algorithms.
"""
