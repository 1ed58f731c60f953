"""Frozen weights in shards (`--shard`): each of W processes holds 1/W of every decoder layer's frozen weights.

FSDP2 (`torch.distributed.fsdp.fully_shard`) shards parameters of any dtype and gathers a layer when its forward or its
backward begins; packed integers travel as they are. So what is frozen, codes and fixed point included, becomes
parameters without gradients, one group a layer. What is trained is left to DistributedDataParallel as ever: gradients,
checkpoints and codes are those of a run without shards, bit by bit.

Whole on every process stay embeddings and head, the scales that training began with, adapters. And before training
each process holds the whole pretrained model: this makes room for activations, not for a larger model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrqat.errors import LrqatError
from lrqat.layers import quantizers
from lrqat.ranks import count, rank
from lrqat.starts.walk import decoder_layers


def check_shards(skeleton: Any) -> None:
    """Refuse what cannot be, before anything long."""
    decoder_layers(skeleton)
    if count() == 1:
        raise LrqatError("shard: one process has nobody to share with; start several (docs/scale-out.md)")
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise LrqatError(f"shard: torch {torch.__version__} cannot leave parameters out; install 2.7 or newer")


class Shards(TrainerCallback):
    """Shards `model` once Trainer has wrapped it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Not before: accelerate refuses to put DistributedDataParallel around sharded parameters."""
        shard(self.model)


def shard(model: nn.Module) -> None:
    """Let go of all but this process's part of what is frozen in the decoder layers.

    Args:
        model: a module that holds a swapped causal language model as `model`, the same in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for quantizer in quantizers(model).values():
        matrices = {name: b for name, b in quantizer.named_buffers(recurse=False) if b.ndim == 2}
        for name, buffer in matrices.items():
            delattr(quantizer, name)
            quantizer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    layers = decoder_layers(model.model)[1]
    trained = {p for p in model.parameters() if p.requires_grad}
    mesh = init_device_mesh(next(model.parameters()).device.type, (count(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    # The root orders what its layers gather, and shards nothing itself.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not is_sharded(p)})


@torch.no_grad()
def unshard(model: nn.Module) -> None:
    """Gather the whole model in process 0's main memory; the others' is of no use any more. All must call it."""
    for module in model.modules():
        parameters: list[tuple[str, Any]] = list(module.named_parameters(recurse=False))
        for name, parameter in parameters:
            if is_sharded(parameter):
                whole = parameter.full_tensor()
                module.register_parameter(name, nn.Parameter(whole.cpu() if rank() == 0 else whole.new_empty(0), False))
            elif rank() == 0:
                parameter.data = parameter.data.cpu()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if rank() == 0:
                module._buffers[name] = buffer.cpu()


def is_sharded(tensor: Tensor) -> bool:
    """It is this process's part of something."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
