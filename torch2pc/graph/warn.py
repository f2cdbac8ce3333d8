"""Warnings, at the line of the user's that called the library."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warn at the line that called the library."""
    level, of_library = 1, 1
    frame = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch2pc."):
            of_library = level
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, stacklevel=of_library + 1)
