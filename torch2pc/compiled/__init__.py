"""All that knows PyTorch's compiler: calls that run as compiled graphs.

``calls.py`` captures a call by ``torch.compile`` and runs its graphs, ``parts.py`` knows what was captured,
``program.py`` traces the sweep, the rule and the updates of ``energy`` and ``inference``, ``rewrites.py``
rewrites what was traced, ``graphs.py`` compiles it, ``products.py`` chooses the faster product of matrices.
Above ``inference``, which knows nothing of it; ``PCInfer`` asks through these names.
"""

from torch2pc.compiled.calls import Relaxing, compiled_or_plain, run_plainly

__all__ = ["Relaxing", "compiled_or_plain", "run_plainly"]
