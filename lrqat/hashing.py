"""SHA-256 of files, in pieces that fit any memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

PIECE = 1 << 22


def sha256(paths: Iterable[Path]) -> str:
    """Hash over the bytes of all files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()
