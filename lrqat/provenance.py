"""Where codes come from: what fused.json tells about the run that made them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any


def provenance(
    method: str, settings: dict[str, Any], base_sha256: str, skipped: Sequence[str], **more: Any
) -> dict[str, Any]:
    """For `FusedCheckpoint.provenance`.

    Args:
        method: how the codes were found.
        settings: all that they depend on.
        base_sha256: hash of the base model's weights.
        skipped: names of the linear layers and experts that are dense on request.
        more: whatever else the method knows.
    """
    import torch
    import transformers

    import lrqat

    return {
        "method": method,
        "settings": settings,
        "base_sha256": base_sha256,
        **more,
        "skipped": list(skipped),
        "versions": {
            "lrqat": lrqat.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
