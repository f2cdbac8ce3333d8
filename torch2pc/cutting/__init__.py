"""From a model to its layers.

``chain.py`` follows a model's forward once, ``grouping.py`` makes layers of what it finds.
"""
