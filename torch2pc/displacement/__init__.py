"""A layer as a displacement, d(delta) = f(vhat + delta) - f(vhat), computed without a difference.

``recorder.py`` notes the operations that a layer is made of while it runs; ``lines.py`` is what becomes of
them, by a rule for each (``rules/``); ``check.py`` holds it against the layer; ``closed.py`` has gradients
of losses in closed form; ``vjp.py`` is autograd's product and graph. Nothing here knows of beliefs, energies
or models; it imports nothing of the library.
"""
