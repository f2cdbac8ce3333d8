"""Following an inference: ``follow`` and ``follow_latent``, and the ``Record`` that they return."""

from torch2pc.follow.follow import follow, follow_latent
from torch2pc.follow.record import Record

__all__ = ["Record", "follow", "follow_latent"]
