"""Train a model on a grid: base model in, RUN/fused out.

RUN/run.json            settings, base hash, data hash: what `--resume` must find unchanged
RUN/teacher.npy         the teacher's hidden states while training; of several processes (`lrqat.ranks`) one file each
RUN/converted/          the checkpoint in another dtype, until it is mapped (`lrqat.convert`)
RUN/start.safetensors   the weights behind a rotation, AWQ or GPTQ
RUN/start/              layers that GPTQ has finished, until all are
RUN/frozen.safetensors  frozen weights, with --offload disk, while training
RUN/blocks/             layers that Block-AP has finished
RUN/checkpoints/        what is trained, and optimizer state
RUN/metrics.jsonl, RUN/loss.png, RUN/summary.json
RUN/layers.json         what training changed, per weight (`lrqat.statistics`)
RUN/tensorboard/        the metrics once more, where tensorboard is installed
RUN/fused/              the fused checkpoint; once it is there, teacher, start, frozen weights and blocks are removed

The teacher is the pretrained model, before anything is done to its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.begin import (
    check_layers,
    prepare_once,
    swap_for_training,
    tell_uncalibrated,
    train_blocks,
    uncalibrated,
    untie,
)
from lrqat.board import Board, board_is_there
from lrqat.chat import answer_blocks
from lrqat.console import device, log, peak_memory_gb
from lrqat.continuing import FusedBase
from lrqat.convert import conversion, converted_model
from lrqat.data import blocks, draw
from lrqat.errors import LrqatError
from lrqat.experts import QuantExperts
from lrqat.fused import FusedCheckpoint, is_fused, read_json, write_json
from lrqat.jsonfile import read_metrics
from lrqat.layers import fuse_model, quantizers, stored_dtype
from lrqat.losses import body_and_head, head_of
from lrqat.memory import give_large_blocks_back, return_freed_memory, wide
from lrqat.methods.products import widens
from lrqat.models import Base, locate
from lrqat.offload import check_offload, offloaded, streamed
from lrqat.optimizer import check_optimizer, make_optimizer
from lrqat.plan import Plan, plan
from lrqat.provenance import provenance
from lrqat.ranks import agree, copy_first, first, join, leave, own, passes, rank, see, share, together
from lrqat.report.charts import running_mean
from lrqat.rounding import Rounding
from lrqat.safestream import tensor_bytes
from lrqat.settings import TrainSettings
from lrqat.shards import Shards, check_shards, unshard
from lrqat.starts.walk import decoder_layers
from lrqat.statistics import moved_share, statistics
from lrqat.teacher import Blocks, cache_named, cache_teacher
from lrqat.trainer import LossModel, LowRankTrainer, Metrics, StopOnSignal, last_checkpoint, without_dropout

ARITHMETIC = 1  # counted up when the same settings come to other codes: kept layers and latents are of one arithmetic


class Interrupted(Exception):
    """The user stopped the run; a checkpoint was written."""


def train(settings: TrainSettings, resume: bool = False) -> dict[str, Any]:
    """Run a whole training, in each of the processes that share it; returns what summary.json holds.

    Raises:
        LrqatError: bad input, before any long work.
        Interrupted: stopped by Ctrl-C with a checkpoint written.
    """
    passes(settings.gradient_accumulation)  # refused before processes meet: one that leaves at once would be missed
    join()
    summary = run(settings, resume)
    leave()
    return summary


def run(settings: TrainSettings, resume: bool) -> dict[str, Any]:
    """`train` of one process among its like."""
    started = time.monotonic()
    check_optimizer(settings.optimizer)
    out = Path(settings.out)
    if (out / "run.json").exists() and not resume:
        raise LrqatError(f"{out}: holds a run already; go on with --resume, or name another --out")
    fused = FusedBase.load(settings.model) if is_fused(settings.model) else None
    settings = fused.settings(settings) if fused else settings
    base = fused or locate(settings.model)
    skeleton = base.skeleton()
    if settings.shard:
        check_shards(skeleton)
    untie(skeleton, settings.beginning)
    check_layers(skeleton, settings.beginning)
    decided = fused.plan(skeleton, settings.rank) if fused else plan(skeleton, settings.assignment, settings.rank)
    dtype = getattr(torch, settings.dtype)
    text_NT, *beside = training_text(settings, base.tokenizer)
    calibrated = settings.calibration_blocks or 0
    calibration_NT = draw(text_NT, calibrated, settings.seed)
    # Steps on the text that Block-AP has fitted the layers to would see errors smaller than they are
    blocks_NT = draw(text_NT, settings.blocks_trained, settings.seed, calibrated)
    fingerprint = make_fingerprint(base, torch.cat((calibration_NT, blocks_NT)), settings)
    agree(fingerprint)
    if resume:
        check_fingerprint(out / "run.json", fingerprint)
        if (out / "summary.json").is_file() and (out / "fused" / "fused.json").is_file():
            log(f"{out}: complete already")
            return read_json(out / "summary.json")
    if settings.answers_only and calibrated:  # packed blocks have pads, and texts that do not meet
        joined_NT = blocks(settings.data, base.tokenizer, settings.seq_len, enough=calibrated)
        calibration_NT = draw(joined_NT, calibrated, settings.seed)
    entries = conversion(base, dtype) if isinstance(base, Base) and device().type == "cpu" else []
    check_offload(settings, decided, skeleton, device(), sum(entry.nbytes for entry in entries))
    log(f"{settings.model}: {decided}")
    tell_uncalibrated(decided, settings.beginning)
    log(f"{settings.model}: {len(blocks_NT)} blocks of {settings.seq_len} tokens, {settings.steps} steps")
    if len(calibration_NT) < calibrated:
        log(f"calibration: the text has {len(calibration_NT)} of the {calibrated} blocks asked for")
    if calibrated and len(text_NT) < settings.blocks_needed:
        log(f"data: {len(text_NT)} blocks, {settings.blocks_needed} are needed: steps see some that calibrate, too")
    if widens(dtype, device().type):
        log(f"dtype: this CPU has no instructions for {settings.dtype}; --dtype float32 is faster, in more memory")
    mine, order = share(len(blocks_NT), settings.blocks_trained, settings.batch_size).unique(return_inverse=True)
    blocks_NT = blocks_NT[mine]
    answers_NT, positions_NT = (
        None if tensor_NT is None else draw(tensor_NT, settings.blocks_trained, settings.seed, calibrated)[mine]
        for tensor_NT in beside
    )
    teacher = out / own("teacher.npy") if settings.loss == "kd" else None
    key = f"{fingerprint['base_sha256']} {fingerprint['data_sha256']} {settings.dtype}"
    head_VH = None
    if teacher and settings.teacher:  # before the student is loaded: never two models at a time
        open_run(out, fingerprint)
        head_VH = cache_named(
            teacher, settings.teacher, base.tokenizer, head_of(skeleton), blocks_NT, dtype, key, positions_NT
        )
    if entries:
        assert isinstance(base, Base)
        model = converted_model(base, dtype, entries, out / "converted")
    else:
        model = base.model(dtype).to(device())
    Rounding().but(settings.activations, settings.kv).check(model)
    body, head = body_and_head(model)
    open_run(out, fingerprint)
    if teacher and head_VH is None:
        with streamed(model):
            cache_teacher(teacher, body, blocks_NT, head.weight_VH.shape[1], dtype, key, positions_NT)
        head_VH = head.weight_VH.detach()
        if settings.rotate is not None:
            head_VH = head_VH.clone()  # the model's own is rotated in place
    stored = stored_dtype(model, base.config)
    make_quantized(model, decided, settings, calibration_NT, stored, out, fingerprint, fused)
    own_VH = model.get_output_embeddings().weight
    teacher_VH = None if head_VH is None or torch.equal(own_VH, head_VH) else head_VH
    del head, head_VH, own_VH
    data = Blocks(blocks_NT, teacher, dtype, answers_NT, order, positions_NT)
    trainer = make_trainer(model, data, settings, out, teacher_VH)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(out / "checkpoints") if resume else None
    training_started = time.monotonic()
    with together():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped and trainer.state.global_step < settings.steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; go on with --resume")
    if settings.shard:
        unshard(trainer.model)
    if rank() == 0:
        finish(model, base, decided, settings, fingerprint, started, training_started)
    see(out / "summary.json")
    return read_json(out / "summary.json")


def finish(
    model: Any,
    base: Base | FusedBase,
    decided: Plan,
    settings: TrainSettings,
    fingerprint: dict[str, Any],
    started: float,
    training_started: float,
) -> None:
    """Fuse the trained model, write what there is to say about the run, remove what it no longer needs."""
    out = Path(settings.out)
    changed = statistics(model)
    before: dict[str, Any] = {"continues": base.checkpoint.provenance} if isinstance(base, FusedBase) else {}
    before |= uncalibrated(decided, settings.beginning)
    told = provenance(settings.method, skipped=decided.skipped, **fingerprint, **before)
    checkpoint_out = fuse_model(model, base.config, base.assets, told)
    log(f"writing {out / 'fused'}")
    checkpoint_out.save(out / "fused")
    write_json(out / "layers.json", changed)
    moved = moved_share(changed["weights"])
    write_summary(out, checkpoint_out, settings, moved, training_started - started, time.monotonic() - started)
    for left in (
        *out.glob("teacher*.npy"),
        *out.glob("teacher*.json"),
        *out.glob("frozen*.safetensors"),
        out / "start.safetensors",
    ):
        left.unlink(missing_ok=True)
    for folder in ("blocks", "converted", "start"):  # of the latter, what a kill has left
        shutil.rmtree(out / folder, ignore_errors=True)


def training_text(settings: TrainSettings, tokenizer: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Blocks of token ids; where only answers are trained on, which tokens those are, and positions."""
    if settings.answers_only:
        return answer_blocks(settings.data, tokenizer, settings.seq_len, enough=settings.blocks_needed)
    return blocks(settings.data, tokenizer, settings.seq_len, enough=settings.blocks_needed), None, None


def make_quantized(
    model: Any,
    decided: Plan,
    settings: TrainSettings,
    calibration_NT: Tensor,
    stored: torch.dtype,
    out: Path,
    fingerprint: dict[str, Any],
    fused: FusedBase | None = None,
) -> None:
    """The pretrained model becomes the one that is trained end to end; what takes long is kept in the run's folder."""
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    beginning = settings.beginning
    if settings.block_epochs:  # GPTQ works on each layer when its turn comes
        beginning = dataclasses.replace(beginning, method="awq" if "awq" in beginning.steps else "rtn")
    path = out / "start.safetensors"
    with first():
        parts = prepare_once(model, decided, beginning, calibration_NT, settings.range_p, stored, path, key)
    with offloaded(settings.offload, out / own("frozen.safetensors"), decided) as frozen:
        if fused:
            swap_for_training(model, decided, settings, fused.parts(model.device), fused.exactly, frozen)
        elif settings.block_epochs:
            with first():
                train_blocks(model, decided, settings, calibration_NT, out / "blocks", key)
            if frozen:
                frozen.finish(model)
        else:
            swap_for_training(model, decided, settings, parts, frozen=frozen)


def open_run(out: Path, fingerprint: dict[str, Any]) -> None:
    """The run's folder, and in it what `--resume` must find unchanged."""
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", fingerprint)
    see(out / "run.json")


def make_fingerprint(base: Base | FusedBase, blocks_NT: Tensor, settings: TrainSettings) -> dict[str, Any]:
    """Everything that the codes depend on."""
    chosen = settings.to_dict()
    chosen.pop("out")
    chosen.pop("save_every")
    chosen.pop("shard")
    chosen.pop("offload")
    return {
        "arithmetic": ARITHMETIC,
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()},
        "base_sha256": base.sha256(),
        "data_sha256": hashlib.sha256(tensor_bytes(blocks_NT)).hexdigest(),
    }


def check_fingerprint(path: Path, now: dict[str, Any]) -> None:
    """Refuse to resume a run under other settings, another base model or other data."""
    if not path.is_file():
        raise LrqatError(f"{path.parent}: no run to resume (no run.json); start without --resume")
    then = read_json(path)
    if then.get("arithmetic") != ARITHMETIC:
        raise LrqatError(f"{path}: another version of lrqat started the run, which computes otherwise; start a new run")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}  # of what came later
    for key, value in now["settings"].items():
        before = then.get("settings", {}).get(key, defaults[key])
        if before != value:
            raise LrqatError(f"{path}: the run was started with {key} {before!r}, now it is {value!r}; use the same")
    for key, what in (("base_sha256", "base model"), ("data_sha256", "training data")):
        if then.get(key) != now[key]:
            raise LrqatError(f"{path}: the {what} has changed since the run was started; start a new run")


def leave_no_holes(model: Any) -> None:
    """Give freed memory back before a decoder layer begins, in either forward pass, and large blocks at once."""
    give_large_blocks_back()
    for layer in decoder_layers(model)[1]:
        layer.register_forward_pre_hook(lambda *_: return_freed_memory())


def make_trainer(
    model: Any, data: Blocks, settings: TrainSettings, out: Path, teacher_VH: Tensor | None = None
) -> LowRankTrainer:
    """AdamW without decay, warm-up then linear decay, gradients clipped to 1: the paper's settings."""
    from transformers import TrainingArguments, get_linear_schedule_with_warmup
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for quantizer in quantizers(model).values():
            quantizer.checkpointed = True
        if wide(model.config) and not torch.cuda.is_available():
            leave_no_holes(model)
    without_dropout(model)
    loss_model = LossModel(model, teacher_VH)
    copy_first(loss_model)
    trained = loss_model.trained()
    groups = [
        {"params": [p for n, p in trained.items() if ".gains." not in n], "lr": settings.lr or 0.0},
        {"params": [p for n, p in trained.items() if ".gains." in n], "lr": settings.lr_scales},
    ]
    optimizer = make_optimizer(settings.optimizer, [g for g in groups if g["params"]])
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * settings.steps), settings.steps)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=passes(settings.gradient_accumulation),
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=any(isinstance(m, QuantExperts) for m in model.modules()),  # no token, no gradient
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # else Trainer sees one process where several share a CPU
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel's replicas hold no parameters; use torchrun
    trainer = LowRankTrainer(
        model=loss_model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[]
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    tokens = settings.batch_size * settings.gradient_accumulation * settings.seq_len
    metrics = Metrics(out / "metrics.jsonl", tokens)
    trainer.add_callback(metrics)
    if settings.shard:
        trainer.add_callback(Shards(loss_model))
    if board_is_there():
        trainer.add_callback(Board(out / "tensorboard", metrics))
    return trainer


def write_summary(
    out: Path, fused: FusedCheckpoint, settings: TrainSettings, moved: float, prepare: float, total: float
) -> None:
    """Write loss.png and summary.json."""
    metrics = read_metrics(out / "metrics.jsonl")
    plot_loss(metrics, settings, out / "loss.png")
    tail = [row["loss"] for row in metrics[-max(1, len(metrics) // 10) :]]
    summary = {
        "grid": settings.grid,
        "override": list(settings.override) or None,
        "method": settings.method,
        "start": settings.start,
        "block_epochs": settings.block_epochs,
        "steps": settings.steps,
        "loss_first": metrics[0]["loss"],
        "loss_last_tenth": sum(tail) / len(tail),
        "codes_moved": moved,
        **fused.counts(),
        "seconds_prepare": prepare,
        "seconds_total": total,
        "tokens_per_second": metrics[-1]["tokens_per_second"],
        "peak_memory_gb": peak_memory_gb(),
        "fused": str(out / "fused"),
    }
    write_json(out / "summary.json", summary)


def plot_loss(metrics: list[dict[str, Any]], settings: TrainSettings, path: Path) -> None:
    """Loss against steps: every step faint, a running mean on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    window, smooth = running_mean(losses)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, linewidth=0.8, alpha=0.35, color="tab:blue", label="each step")
    axes.plot(steps, smooth, linewidth=2, color="tab:blue", label=f"mean of {window}")
    name = "KL to the full-precision model" if settings.loss == "kd" else "cross-entropy"
    axes.set(xlabel="step", ylabel=f"{name} (nats per token)", title=f"{settings.method}, {settings.grid}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
