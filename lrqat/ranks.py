"""Several processes that train one model, started by `torchrun` or `accelerate launch`: who does what.

    every process    reads the text, loads the model, makes the quantizers; has the teacher's states of its own blocks
                     and trains on these; gradients are averaged (DistributedDataParallel): all hold the same parameters
    process 0 alone  finds the start (GPTQ, AWQ, Block-AP), which the others then read; writes into RUN; speaks

A step is `gradient_accumulation` forward passes, whatever number of processes shares them. They are dealt out in turn;
with a batch of 2, a step of 2 passes and blocks 0, 1, 2, ... in a run's order,

    1 process     step 0: 0 1 | 2 3    step 1: 4 5 | 6 7
    2 processes   step 0: 0 1          step 1: 4 5         process 0
                          2 3                  6 7         process 1

so a run has the same batches on any number of processes, and may be resumed on another one. What differs is the order
in which the gradients of a step's passes are summed and divided: with two processes of one pass each, not even that.

RUN lies on a file system that all processes share. Without a launcher there is one process and nothing here does much.
`rank` and `count` need no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrqat.errors import LrqatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(days=7)  # GPTQ may take hours; that a process has died is the launcher's to notice
LAST_WORD_SECONDS = 2.0
SHARED_SECONDS = 90.0  # a network file system may remember for a minute that a file was not there
# What gloo says when the other end is gone; it has no exception of its own.
LOST = re.compile(r"connection (reset|closed|refused)|broken pipe", re.IGNORECASE)


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", 0)) if "LOCAL_RANK" in os.environ else 0


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def join() -> None:
    """Meet the other processes; from now on `cuda` is this process's own GPU.

    Raises:
        LrqatError: accelerate was configured to shard what training expects to be whole.
    """
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise LrqatError(f"accelerate: is configured for {engine}; launch with --multi_gpu, and train with --shard")
    if "LOCAL_RANK" in os.environ:
        import torch
        from accelerate import PartialState

        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else accelerate changes the number
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        wait()  # for those that are still meeting: left at once by one that refuses something, they would fail


def leave() -> None:
    """Part with the other processes, once nothing waits for them."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def first() -> Iterator[None]:
    """Process 0 goes through the body before the others, which find there what it has kept."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


def passes(gradient_accumulation: int) -> int:
    """Forward passes a step of each process."""
    each, left = divmod(gradient_accumulation, count())
    if left:
        wanted = (each + 1) * count()
        raise LrqatError(
            f"gradient_accumulation: {gradient_accumulation} forward passes a step cannot be shared by {count()} "
            f"processes; use --gradient-accumulation {wanted}"
        )
    return each


def share(blocks: int, wanted: int, batch_size: int) -> Tensor:
    """Which blocks this process trains on, in order, int64 [wanted / processes]; see the module's docstring.

    Args:
        blocks: how many there are; where they are fewer than wanted, they are gone through again.
        wanted: blocks of the whole run.
        batch_size: blocks of a forward pass.
    """
    import torch

    return torch.arange(wanted).remainder(blocks).view(-1, batch_size)[rank() :: count()].flatten()


def own(name: str) -> str:
    """The name of a file that each process has for itself: teacher.npy, teacher.1-of-2.npy."""
    stem, _, suffix = name.partition(".")
    return name if count() == 1 else f"{stem}.{rank()}-of-{count()}.{suffix}"


def agree(fingerprint: dict[str, Any]) -> None:
    """Refuse to train where the processes were told, or have read, different things."""
    if count() == 1:
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather

    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()
    found = gather(torch.tensor([list(digest)], device=PartialState().device))
    for other in range(1, count()):
        if not torch.equal(found[other], found[0]):
            raise LrqatError(
                f"process {other}: was given other flags, another base model or other data than process 0; "
                "run the same command on the same files everywhere"
            )


def agreed(said: bool) -> bool:
    """Whether any process says so."""
    if count() == 1:
        return said
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather

    return bool(gather(torch.tensor([said], dtype=torch.uint8, device=PartialState().device)).any())


def see(path: Path) -> None:
    """Refuse to go on where a file that process 0 has written is not to be seen."""
    wait()
    started = time.monotonic()
    while not path.is_file():
        if time.monotonic() - started > SHARED_SECONDS:
            raise LrqatError(f"{path}: process {rank()} does not see it; name an --out that all processes share")
        time.sleep(0.5)


def copy_first(model: torch.nn.Module) -> None:
    """Give all processes what is frozen in process 0, and DistributedDataParallel only what is trained.

    Left to itself, it would send all buffers, the frozen weights among them, in front of every forward pass.
    """
    if count() == 1:
        return
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from lrqat.pages import only_read

    for tensor in (*model.buffers(), *(p.detach() for p in model.parameters() if not p.requires_grad)):
        if not only_read(tensor):  # what is mapped cannot be written to; each process has mapped the same values
            torch.distributed.broadcast(tensor, 0)
    left = [name for name, _ in model.named_buffers()]
    left += [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left)


@contextmanager
def together() -> Iterator[None]:
    """A body in which processes wait for each other: that one of them has gone is one line."""
    try:
        yield
    except RuntimeError as error:
        import torch

        if count() > 1 and (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
            reason = str(error).splitlines()[0]
            raise LrqatError(
                f"another process cannot be reached ({reason}); start all of them again with --resume"
            ) from None
        raise


def complain(text: str) -> None:
    """One line on stderr, of all processes that have the same to say.

    As a rule all fail alike. So the others wait a moment: the launcher ends them once process 0 has failed.
    """
    if rank():
        time.sleep(LAST_WORD_SECONDS)
        text = f"process {rank()}: {text}"
    print(f"error: {text}", file=sys.stderr, flush=True)
