"""Training that goes on from a fused checkpoint: its codes and its scales are where the method begins.

    latent  x = level of the code, exactly;    parts = the checkpoint's, exactly

Nothing is rounded again: that the quantizers begin with the checkpoint's codes and parts, bit for bit, is checked
weight by weight. Which weights are quantized, and on which grids, is the checkpoint's; so are, unless flags say
otherwise, the activations, keys and values that it was trained to have rounded.

A fused checkpoint is no full-precision model, so it is nobody's teacher unless the user names it: without --teacher,
the loss is next-token CE; with --teacher MODEL (the original, as a rule) it is distilled from that.

Refuses what would round or change the weights before training: another grid, overrides, starts, rotations, LoftQ,
Block-AP (whose targets are full precision).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor, Lazy, SafetensorsDirectory, is_fused
from lrqat.grid import Grid
from lrqat.hashing import sha256
from lrqat.layers import Make
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.scales import Scales
from lrqat.models import build_config, fake_quant_model, fused_tokenizer
from lrqat.plan import Plan, check_site
from lrqat.rounding import Rounding
from lrqat.settings import NONE, TrainSettings
from lrqat.sites import TIED_HEAD, TRAINED, Site, sites


@dataclass(frozen=True)
class FusedBase:
    """A fused checkpoint in the place of a base model (`lrqat.models.Base`): the same questions, its own answers.

    Attributes:
        source: what the user named.
        checkpoint: what is there.
    """

    source: str
    checkpoint: FusedCheckpoint

    @classmethod
    def load(cls, source: str) -> FusedBase:
        """Open the checkpoint, or the one in a run."""
        return cls(source, FusedCheckpoint.load(Path(source).expanduser()))

    @property
    def grid(self) -> str:
        """The grid that most weights are on."""
        counts = Counter(str(spec.grid) for spec in self.checkpoint.specs.values())
        return counts.most_common(1)[0][0]

    def model(self, dtype: torch.dtype) -> Any:
        """The transformers model of the dequantized weights."""
        return fake_quant_model(self.checkpoint, dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return fused_tokenizer(self.checkpoint)

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.hf_config

    @property
    def assets(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation files, as they came."""
        return self.checkpoint.assets

    def skeleton(self) -> Any:
        """The model without weights (on the meta device)."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(build_config(self.config, self.source))

    def sha256(self) -> str:
        """Hash over the weight files' bytes."""
        directory = Path(self.source).expanduser()
        inner = directory / "fused"
        return sha256(SafetensorsDirectory(inner if is_fused(inner) else directory).paths)

    def plan(self, model: Any, rank: int | None) -> Plan:
        """Which matrices are quantized, and how: as they are."""
        specs = self.checkpoint.specs
        found = {site.name: site for site in sites(model) if site.kind != TIED_HEAD}
        if lost := sorted(specs.keys() - found.keys()):
            raise LrqatError(
                f"{self.source}: {lost[0]} is no matrix of {type(model).__name__}; is config.json its own?"
            )
        grids = {name: specs[name].grid for name in found if name in specs}
        for name, grid in grids.items():
            check_site(found[name], grid, None, rank if found[name].kind in TRAINED else None)
        return Plan(found, grids)

    def settings(self, given: TrainSettings) -> TrainSettings:
        """The settings with what the checkpoint decides; refuses those that it cannot follow."""
        if given.grid != self.grid:
            raise LrqatError(f"grid {given.grid}: {self.source} is on {self.grid} already; leave --grid out")
        refused = {
            "override": given.override,
            "skip": given.skip,
            "rotate": given.rotate is not None,
            "loftq": given.loftq,
            "start": given.start != "rtn",
            "range_p": given.range_p != TrainSettings.range_p,
        }
        if names := [name for name, value in refused.items() if value]:
            raise LrqatError(
                f"{names[0]}: {self.source} is a fused checkpoint, whose codes are the start; leave it out"
            )
        if given.block_epochs:
            raise LrqatError(
                f"method {given.method}: Block-AP needs full-precision weights, and {self.source} is a fused "
                "checkpoint; use no --block-epochs, and --method scales for EfficientQAT's second stage"
            )
        if given.loss == "kd" and given.teacher is None:
            raise LrqatError(
                f"loss kd: {self.source} is a fused checkpoint, no full-precision teacher; name one with --teacher, or "
                "use --loss ce"
            )
        rounding = Rounding.trained(self.checkpoint.provenance).but(given.activations, given.kv)
        return dataclasses.replace(given, activations=rounding.activations or NONE, kv=rounding.kv or NONE)

    def parts(self, device: torch.device) -> Lazy[dict[str, Tensor]]:
        """The grids' parts by weight, float32."""

        def make(name: str) -> dict[str, Tensor]:
            found = self.checkpoint.tensors[name].parts
            return {part: values.to(device, torch.float32) for part, values in found.items()}

        return Lazy(self.checkpoint.specs, make)

    def exactly(self, make: Make, method: str) -> Make:
        """`make`, from the codes themselves instead of the model's weights, which a narrow dtype has rounded."""

        def made(site: Site, weight_OI: Tensor, grid: Grid) -> WeightQuantizer:
            fused = self.checkpoint.tensors[site.name]
            if method == "scales" and site.kind in TRAINED:
                quantizer: WeightQuantizer = Scales.from_fused(fused, weight_OI.device)
            else:
                quantizer = make(site, fused.dequantize().to(weight_OI.device), grid)
            check_same(site.name, quantizer.fuse(), fused)
            return quantizer

        return made


def check_same(name: str, found: FusedTensor, wanted: FusedTensor) -> None:
    """Refuse to begin beside the checkpoint: a group whose scale is 0 holds codes that no real weight has."""
    if found.sha256() != wanted.sha256():
        raise LrqatError(
            f"{name}: training would not begin with the checkpoint's codes, some of which stand under a scale of 0; "
            "use --method scales, which keeps them"
        )


def continued(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `lrqat train` with the defaults that a fused checkpoint has: its grid; CE where nobody teaches."""
    base = FusedBase.load(given["model"])
    return {"grid": base.grid, "loss": "kd" if given.get("teacher") else "ce", **given}
