"""From a model to its layers.

``forward.py`` follows a model's forward once, and ``origin.py`` notes what that took from it. ``chain.py``
cuts what was found where it is a chain, and ``grouping.py`` makes layers of the pieces; ``graph.py`` cuts it
at the beliefs that are asked for. ``same.py`` holds what comes of it against the model.
"""
