"""Y. Song and others, *Inferring neural activity before plasticity as a foundation for learning beyond
backpropagation*, Nature Neuroscience 27 (2024), and F. Innocenti and others, *Only Strict Saddles in the
Energy Landscape of Predictive Coding Networks?*, arXiv:2408.11979 (2024): where predictive coding is
said to learn better than backpropagation.
"""
