"""A model as fixed functions, each of the beliefs that it depends on, for the duration of one call.

``layers.py``: a layer that can be evaluated again as it was, and the network of them; ``autograd.py``:
gradients and leaves of graphs; ``apart.py``: what is known of layers that need memory of their own;
``state.py``: random generators, buffers and ``.grad``, to be found, kept and put back. Above
``displacement``; it knows no algorithm.
"""
