"""Rotations that fold (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406): the same function in a
basis without outliers.

    norms        weight into the linear layers that read them, then 1                 normalized(x) R = normalized(x R)
    R1 [H, H]    embedding E R;  readers W R;  o_proj, down_proj R^T W                 the residual stream becomes h R
    R2 [D, D]    v_proj, per value head, R2^T W;  o_proj, per head, W R2               inside attention

The readers are q, k, v, gate, up and the head; of a fused qkv_proj the last rows are v_proj's. R is a random Hadamard
matrix where the size is a power of two, else one times a random orthogonal matrix of the odd rest. All products are
formed in float64 and rounded once to the dtype.

The head reads the final norm, so it gets R1 and that norm's weight, the embedding R1 alone: a tied head has to be
untied, which costs V x H more parameters, in memory and in the exported file. Refused unless asked for.

What else a model does between these places cannot be read off its modules' names (BitNet has norms behind attention,
Doge scales its residual stream), so its logits are compared before and after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.ranges import row_tiles
from lrqat.starts.fold import LlamaLayer, check_norm
from lrqat.starts.walk import decoder_layers

AT_ONCE = 1 << 24  # numbers of a float64 temporary
PROBE = 32  # tokens whose logits are compared
# Of |after - before| / |before|; SmolLM2-135M was seen to move by 1e-6 in float32 and 2% in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


@torch.no_grad()
def rotate(model: Any, seed: int, *, untie: bool = False, values: bool = True) -> None:
    """Fold norms and rotate, in place; its logits stay what they were, but for rounding.

    Args:
        model: a llama-like model.
        seed: of the random signs and matrices.
        untie: a tied head becomes a parameter of its own.
        values: rotate values too (R2).

    Raises:
        LrqatError: a tied head, or layers that are not llama-like, before anything is changed; a model that has
            another function now, which is of no use any more.
    """
    name, modules = decoder_layers(model)
    layers = [LlamaLayer(layer, f"{name}.{number}") for number, layer in enumerate(modules)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    final = getattr(model.base_model, "norm", None)
    if final is None or head is None or type(embedding) is not nn.Embedding or any(x.o is None for x in layers):
        raise LrqatError(f"{type(model).__name__}: not llama-like (an embedding, layers, norm, head); cannot rotate it")
    if lost := [number for number, layer in enumerate(layers) if layer.down is None]:
        raise LrqatError(f"{name}.{lost[0]}: not a llama-like layer (no mlp.down_proj); cannot rotate it")
    check_norm(final, "norm")
    if head.weight is embedding.weight:
        untie_head(model, untie)
        head = model.get_output_embeddings()
    before_TV = probe(model)
    generator = torch.Generator().manual_seed(seed)
    r1_HH = orthogonal(embedding.embedding_dim, generator).to(embedding.weight.device)
    for norm, readers in [pair for layer in layers for pair in layer.norms] + [(final, [head])]:
        for reader in readers:
            rotate_rows(reader.weight, norm.weight, r1_HH)
        norm.weight.fill_(1)
    rotate_rows(embedding.weight, None, r1_HH)
    for layer in layers:
        for writer in (layer.o, layer.down):
            assign(writer.weight, r1_HH.T @ writer.weight.double())
            if writer.bias is not None:
                assign(writer.bias, writer.bias.double() @ r1_HH)
        if values and layer.values() and layer.head_dim:
            rotate_values(layer, orthogonal(layer.head_dim, generator).to(r1_HH.device))
    off = (probe(model) - before_TV).norm() / before_TV.norm()
    if not off < TOLERANCE[embedding.weight.dtype]:
        raise LrqatError(
            f"{type(model).__name__}: rotating changed its logits by {off:.0%}; it is not llama-like between its "
            "linear layers; leave --rotate out"
        )


def probe(model: Any) -> Tensor:
    """Logits [T, V] of some tokens, float32."""
    embedding = model.get_input_embeddings().weight
    ids_T = torch.randint(len(embedding), (1, PROBE), generator=torch.Generator().manual_seed(0))
    logits_TV: Tensor = model(input_ids=ids_T.to(embedding.device), use_cache=False).logits[0].float()
    return logits_TV


def rotate_values(layer: LlamaLayer, r2_DD: Tensor) -> None:
    """v R2 in every value head, undone by o_proj. A value's bias is rotated with it."""
    for value in layer.values():
        heads = value.double().unflatten(0, (-1, layer.head_dim))
        assign(value, torch.einsum("kd...,de->ke...", heads, r2_DD).flatten(0, 1))
    heads = layer.o.weight.double().unflatten(1, (-1, layer.head_dim))
    assign(layer.o.weight, (heads @ r2_DD).flatten(1))


def untie_head(model: Any, allowed: bool) -> None:
    """Give a tied head a copy of its own, or say what that would cost."""
    weight_VH = model.get_input_embeddings().weight
    if not allowed:
        megabytes = weight_VH.nbytes / 1e6
        raise LrqatError(
            f"{type(model).__name__}: rotating it unties the head from the embedding, which costs "
            f"{weight_VH.numel()} more parameters ({megabytes:.0f} MB); allow it by --untie-head, or leave --rotate out"
        )
    model.get_output_embeddings().weight = nn.Parameter(weight_VH.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def rotate_rows(parameter: Tensor, scale_H: Tensor | None, r_HH: Tensor) -> None:
    """W diag(scale) R in float64, some rows at a time: a head of 128 thousand words by 4096 would be 4 GB of it."""
    for rows in row_tiles(parameter.shape[0], parameter.shape[1], AT_ONCE):
        own_KH = parameter.data[rows].double()
        assign(parameter.data[rows], (own_KH if scale_H is None else own_KH * scale_H.double()) @ r_HH)


def assign(parameter: Tensor, values: Tensor) -> None:
    """Round once to the parameter's dtype."""
    parameter.data.copy_(values.to(parameter.dtype))


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Random, float64 [size, size]: a Hadamard matrix of the power of two in `size`, times an orthogonal one."""
    odd, hadamard = size, torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))) / 2**0.5
    rest = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator)).Q.contiguous()
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * torch.kron(hadamard, rest)
