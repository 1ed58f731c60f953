"""What a run rounds beside its weights, and the same again on the model that it handed over.

    activations   what flows into quantized layers, per token        `lrqat.activations`
    kv            keys and values, per token and head                `lrqat.kv`
    both          queries too, to the bits of 8 or 4 bit activations; int8 is a runtime's, which leaves them

A run's choice stands in fused.json, provenance.settings; `lrqat eval` and `lrqat zeroshot` follow it, so that what is
judged is what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lrqat.activations import round_inputs
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.kv import check_kv, round_kv
from lrqat.layers import QuantLinear, swap
from lrqat.methods.rounded import Rounded
from lrqat.models import fake_quant_model
from lrqat.plan import Plan
from lrqat.settings import ACTIVATIONS, KV, NONE
from lrqat.sites import EXPERT, LINEAR, sites


@dataclass(frozen=True)
class Rounding:
    """One choice.

    Attributes:
        activations: a key of ACTIVATIONS, or None.
        kv: a key of KV, or None.
    """

    activations: str | None = None
    kv: str | None = None

    @classmethod
    def trained(cls, provenance: Mapping[str, Any]) -> Rounding:
        """What a fused checkpoint was trained with; refuses what this lrqat does not know."""
        found = provenance.get("settings") or {}
        activations, kv = found.get("activations"), found.get("kv")
        if activations not in (None, NONE, *ACTIVATIONS) or kv not in (None, NONE, *KV):
            raise LrqatError(
                f"fused checkpoint: was trained with activations {activations!r} and kv {kv!r}, which this lrqat does "
                "not know; use the lrqat that wrote it"
            )
        return cls().but(activations, kv)

    def but(self, activations: str | None, kv: str | None) -> Rounding:
        """With what flags say instead: None leaves it, "none" turns it off."""
        return Rounding(
            self.activations if activations is None else None if activations == NONE else activations,
            self.kv if kv is None else None if kv == NONE else kv,
        )

    def __bool__(self) -> bool:
        return self != Rounding()

    def __str__(self) -> str:
        return f"activations {self.activations or NONE}, kv {self.kv or NONE}"

    def check(self, model: Any) -> None:
        """Refuse a model that cannot be rounded so, before anything long is done to it."""
        if self.kv is not None:
            check_kv(model, KV[self.kv])

    def apply(self, model: Any) -> None:
        """Round in a model whose quantized layers are QuantLinear."""
        self.inputs(model, quantized_layers(model))
        self.keys(model)

    def inputs(self, model: Any, names: list[str]) -> None:
        """Round activations in front of these modules."""
        if self.activations is not None:
            bits, symmetric = ACTIVATIONS[self.activations]
            round_inputs(model, names, bits, symmetric=symmetric)

    def keys(self, model: Any) -> None:
        """Round keys and values, and queries where activations are rounded as the paper's are."""
        if self.kv is not None:
            bits, symmetric = ACTIVATIONS[self.activations] if self.activations else (None, False)
            round_kv(model, KV[self.kv], None if symmetric else bits)


def quantized_layers(model: Any) -> list[str]:
    """Names of a model's QuantLinear modules."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def rounded_model(checkpoint: FusedCheckpoint, rounding: Rounding, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a fused checkpoint, dequantized, rounding as its training did."""
    model = fake_quant_model(checkpoint, dtype)
    found = [site for site in sites(model) if site.name in checkpoint.specs]
    names = [site.origin.parameter.removesuffix(".weight") for site in found if site.kind == LINEAR]
    experts = {site.name: site for site in sites(model) if site.kind == EXPERT}
    grids = {name: checkpoint.specs[name].grid for name in experts if name in checkpoint.specs}
    if rounding.activations is not None and grids:  # in transformers' fused experts nothing can be rounded
        device = torch.device("cpu")
        swap(model, Plan(experts, grids), lambda site, _weight, _grid: Rounded(checkpoint.tensors[site.name], device))
        names += quantized_layers(model)
    rounding.inputs(model, names)
    rounding.keys(model)
    return model
