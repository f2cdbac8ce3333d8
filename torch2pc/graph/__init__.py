"""A model as fixed functions, each of the beliefs that it depends on, for the duration of one call.

``nodes.py``: how layers are connected (``PCGraph``); ``layer.py``: a layer that can be evaluated again as it
was; ``network.py``: a model's layers and its loss, fed forward; ``autograd.py``: gradients and leaves of
graphs; ``apart.py``: layers that need memory of their own; ``state.py``: random generators, buffers and
``.grad``, to be found, kept and put back. Above ``displacement``; it knows no algorithm.
"""
