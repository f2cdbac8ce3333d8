"""A layer as a displacement, d(delta) = f(vhat + delta) - f(vhat), computed without a difference.

``recorder.py`` notes the operations that a layer is made of while it runs, and puts their rules
(``rules/``) together. Nothing here knows of beliefs, energies or models; it imports nothing of the library.
"""
