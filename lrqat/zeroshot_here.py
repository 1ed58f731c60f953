"""Zero-shot scores of a model in this process, by its own logits.

lm-eval's HFLM runs context and continuation of every choice as a row of its own, and the head on all of it. Here a
context that several continuations share is read once, its keys and values are kept for all of them, and the head sees
what is scored alone. Of the four tasks' 1.03 million tokens .72 are left, and .19 in front of the head (SmolLM2's
tokenizer). Contexts of one length make a batch, so nothing is padded but the ends of continuations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lrqat.console import bar
from lrqat.evaluate import CHUNK_TOKENS, load_any, rounding_of
from lrqat.losses import Head, body_and_head
from lrqat.zeroshot import Pair, Score, cut


def model_here(source: str, dtype: str, activations: str | None, kv: str | None, batch_size: int) -> tuple[Any, str]:
    """(lm-eval's model around one by name, what that rounds beside its weights)."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Score]:
            # One more than the model reads: nobody asks what follows the last token.
            return scores(model, [cut(ids, more, self.max_length + 1) for _, ids, more in requests], batch_size)

    rounding = rounding_of(source, activations, kv)
    model, tokenizer = load_any(source, getattr(torch, dtype), rounding)
    return Shared(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)), str(rounding)


@torch.no_grad()
def scores(model: Any, pairs: Sequence[Pair], batch_size: int) -> list[Score]:
    """Log-probability of each continuation behind its context, in nats, and whether it is the likeliest.

    Args:
        model: a causal language model.
        pairs: contexts and continuations, at least one token each.
        batch_size: continuations at a time.
    """
    body, head = body_and_head(model)
    found: dict[int, Score] = {}
    for places in bar(batches(pairs, batch_size), "zeroshot"):
        found.update(zip(places, batch_scores(body, head, [pairs[place] for place in places]), strict=True))
    return [found[place] for place in range(len(pairs))]


def batches(pairs: Sequence[Pair], batch_size: int) -> list[list[int]]:
    """Places in `pairs`, the longest first: continuations of one context side by side, contexts of a batch alike in
    length and in how many continuations they have."""
    sharing = defaultdict[tuple[int, ...], list[int]](list)
    for place, (context, _) in enumerate(pairs):
        sharing[tuple(context)].append(place)
    alike = defaultdict[tuple[int, int], list[list[int]]](list)
    for context, places in sharing.items():
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            alike[len(context), len(some)].append(some)
    found = []
    for (_, count), groups in sorted(alike.items(), reverse=True):
        groups.sort(key=lambda places: max(len(pairs[place][1]) for place in places))
        step = batch_size // count
        for start in range(0, len(groups), step):
            found.append([place for places in groups[start : start + step] for place in places])
    return found


def batch_scores(body: Any, head: Head, pairs: Sequence[Pair]) -> list[Score]:
    """Of continuations whose contexts are of one length; those of one context stand side by side."""
    device = head.weight_VH.device
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    read: dict[str, Any] = {"use_cache": False}
    if len(contexts[0]) > 1:
        contexts_CK = torch.tensor(contexts, device=device)
        cache = body(contexts_CK[:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(pairs) // len(contexts))
        read = {"past_key_values": cache, "use_cache": True}
    inputs = [torch.tensor([*context[-1:], *continuation[:-1]], device=device) for context, continuation in pairs]
    states_RLH = body(pad_sequence(inputs, batch_first=True), **read).last_hidden_state
    lengths = [len(ids) for ids in inputs]
    states_TH = torch.cat([states_LH[:length] for states_LH, length in zip(states_RLH, lengths, strict=True)])
    wanted_T = torch.tensor([token for _, continuation in pairs for token in continuation], device=device)
    nats, first = [], []
    for states_CH, wanted_C in zip(states_TH.split(CHUNK_TOKENS), wanted_T.split(CHUNK_TOKENS), strict=True):
        log_p_CV = head.logits(states_CH).float().log_softmax(1)
        nats.append(log_p_CV.gather(1, wanted_C[:, None])[:, 0].double())
        first.append(log_p_CV.argmax(1) == wanted_C)
    each = zip(torch.cat(nats).split(lengths), torch.cat(first).split(lengths), strict=True)
    return [(nats_L.sum().item(), bool(first_L.all())) for nats_L, first_L in each]
