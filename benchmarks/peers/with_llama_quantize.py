"""llama.cpp's llama-quantize, with or without an importance matrix, through its C library.

The library is the one that node-llama-cpp ships (`npm pack @node-llama-cpp/linux-x64`); llama_model_quantize is what
the command llama-quantize calls, so types fall back as there: columns that 256 does not divide have no K-quants.
The full-precision GGUF file is written by lrqat's exporter, so this script wants lrqat's own environment.

llama-imatrix is not in that library. Its matrix, the mean square of each linear's inputs over chunks of 512 tokens,
is computed here with transformers in float32; the file keeps what that cost, and every run that uses it is charged.

    python benchmarks/peers/with_llama_quantize.py MODEL OUT --library DIR --type Q4_K_M
    python benchmarks/peers/with_llama_quantize.py MODEL OUT --library DIR --type Q4_K_M --imatrix FILE --text FILE...
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections import Counter
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared import Cost, blocks, finish, fresh, parser
from torch import Tensor

from exporters import gguf
from exporters.gguf_arch import architecture
from lrqat.fused import FusedCheckpoint, Lazy, SafetensorsDirectory, read_assets, read_json
from lrqat.gguf_file import GgufFile

RELEASE = "llama.cpp v0.5.0 (node-llama-cpp 3.22.1)"  # whose structures these are
FILE_TYPES = {  # llama_ftype
    "Q4_0": 2,
    "Q4_1": 3,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "Q2_0": 41,
}
CHUNKS, CHUNK_TOKENS = 128, 512  # the latter is llama-imatrix's default; it takes whatever text it is given
COUNT = 43  # GGML_TYPE_COUNT: "as the file type says"


class ImatrixData(ctypes.Structure):
    """llama_model_imatrix_data: a tensor's importances; an array of them ends with an empty name."""

    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params; the last two fields are newer than public headers, and stay as they come."""

    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int32),
        ("output_tensor_type", c_int32),
        ("token_embedding_type", c_int32),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", POINTER(ImatrixData)),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("unnamed", c_int32 * 2),
    )


class Library:
    """llama.cpp's shared objects in one directory."""

    def __init__(self, directory: Path) -> None:
        def load(stem: str) -> ctypes.CDLL:
            found = sorted(directory.glob(f"{stem}*.so"))
            if not found:
                sys.exit(f"--library {directory}: no {stem}*.so; npm pack @node-llama-cpp/linux-x64@3.22.1, unpack it")
            return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)

        self.base, self.ggml, self.llama = load("libggml-base"), load("libggml.v"), load("libllama.v")
        self.ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
        self.ggml.ggml_backend_load_all_from_path(str(directory).encode())
        self.llama.llama_backend_init()
        self.llama.llama_model_quantize_default_params.restype = QuantizeParams
        self.llama.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(QuantizeParams)]
        self.base.ggml_row_size.restype, self.base.ggml_row_size.argtypes = c_size_t, [c_int32, c_int64]
        self.base.ggml_type_name.restype = c_char_p
        defaults = self.llama.llama_model_quantize_default_params()
        said = (defaults.output_tensor_type, defaults.token_embedding_type, defaults.quantize_output_tensor)
        if said != (COUNT, COUNT, True) or defaults.imatrix or defaults.pure or defaults.dry_run:
            sys.exit(f"--library {directory}: llama_model_quantize_params has another layout; expected {RELEASE}")

    def quantize(self, source: Path, out: Path, kind: str, imatrix: dict[str, Tensor]) -> None:
        """What `llama-quantize [--imatrix] source out kind` does."""
        params = self.llama.llama_model_quantize_default_params()
        params.nthread, params.ftype = torch.get_num_threads(), FILE_TYPES[kind]
        rows = {name: values.float().contiguous() for name, values in imatrix.items()}
        entries = [
            ImatrixData(name.encode(), ctypes.cast(values.data_ptr(), POINTER(c_float)), values.numel())
            for name, values in rows.items()
        ]
        if entries:
            params.imatrix = (ImatrixData * (len(entries) + 1))(*entries)
        if self.llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
            sys.exit(f"{out}: llama_model_quantize failed; its reason stands above")

    def type_name(self, number: int) -> str:
        """Q4_K of 12."""
        return str(self.base.ggml_type_name(number).decode())

    def row_bytes(self, number: int, columns: int) -> int:
        """Bytes of a row."""
        return int(self.base.ggml_row_size(number, columns))

    def dequantize(self, file: GgufFile, name: str) -> Tensor:
        """A tensor of the file in float32, by ggml's own code."""
        info = file.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        raw = file.read(name, rows * self.row_bytes(info.ggml_type, info.shape[-1]))
        kind = self.type_name(info.ggml_type)
        if kind in FLOATS:
            return torch.frombuffer(raw, dtype=FLOATS[kind]).view(info.shape).float()
        values = torch.empty(info.shape)
        decode = getattr(self.base, f"dequantize_row_{kind}")
        decode.argtypes = [c_char_p, c_void_p, c_int64]
        decode(bytes(raw), values.data_ptr(), values.numel())
        return values


FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def importance(model: Path, text: list[Path]) -> dict[str, Tensor]:
    """Mean square of every linear's inputs, by GGUF name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    names = {hf[0]: name for name, hf in architecture(read_json(model / "config.json")).names().items()}
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, 1).square().sum(0).double()

        return hook

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(names[f"{name}.weight"]))
    for block in blocks(AutoTokenizer.from_pretrained(model), text, CHUNKS, CHUNK_TOKENS):
        net.model(block[None], use_cache=False)
    return {name: (total / (CHUNKS * CHUNK_TOKENS)).float() for name, total in sums.items()}


def kept_importance(file: Path, model: Path, text: list[Path]) -> tuple[dict[str, Tensor], Cost]:
    """The matrix in a file, and what it cost; where there is no file, computed and written there (and costs nothing
    more than this process already counts)."""
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            cost = Cost(**json.loads(opened.metadata()["cost"]))
        return load_file(file), cost
    if not text:
        sys.exit(f"--imatrix {file}: not there, and no --text to make it from")
    matrix = importance(model, text)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(matrix, file, {"cost": json.dumps(vars(Cost.so_far()))})
    return matrix, Cost(0, 0, 0)


def full_precision(model: Path, out: Path) -> None:
    """The model as a GGUF file that nothing has rounded: what convert_hf_to_gguf.py makes."""
    files = SafetensorsDirectory(model)
    dense = Lazy(files.specs, files.get)
    gguf.write(FusedCheckpoint({}, dense, {}, files.specs, read_json(model / "config.json"), read_assets(model)), out)


def main() -> None:
    """Quantize, and decode what came out."""
    arguments = parser(__doc__ or "", grid=None)
    arguments.add_argument("--type", choices=sorted(FILE_TYPES), default="Q4_K_M", help="as llama-quantize has it")
    arguments.add_argument("--imatrix", type=Path, help="importance matrix; made from --text if it is not there")
    arguments.add_argument("--library", type=Path, required=True, help="directory of libllama*.so")
    args = arguments.parse_args()
    library, out = Library(args.library), fresh(args.out)
    matrix, before = kept_importance(args.imatrix, args.model, args.text) if args.imatrix else ({}, Cost(0, 0, 0))
    full_precision(args.model, out / "full.gguf")
    library.quantize(out / "full.gguf", out / "quantized.gguf", args.type, matrix)
    now = Cost.so_far()
    cost = Cost(
        now.seconds + before.seconds,
        now.cpu_seconds + before.cpu_seconds,
        max(now.peak_memory_gb, before.peak_memory_gb),
    )
    (out / "full.gguf").unlink()

    file, layout = GgufFile(out / "quantized.gguf"), architecture(read_json(args.model / "config.json"))
    weights = {
        hf[0]: layout.to_hf(hf[0], library.dequantize(file, name))
        for name, hf in layout.names().items()
        if name in file.tensors
    }
    kinds: Counter[str] = Counter()
    spent = 0
    for name, info in file.tensors.items():
        if name.startswith("blk.") and len(info.shape) == 2:
            kinds[library.type_name(info.ggml_type)] += math.prod(info.shape)
            spent += 8 * info.shape[0] * library.row_bytes(info.ggml_type, info.shape[1])
    mixture = ", ".join(f"{kind} {count / kinds.total():.0%}" for kind, count in kinds.most_common())
    head = library.type_name(file.tensors["token_embd.weight"].ggml_type)
    imatrix = f"imatrix over {CHUNKS} x {CHUNK_TOKENS} tokens" if matrix else "no imatrix"
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="llama-quantize",
        version=RELEASE,
        method="imatrix" if matrix else "plain",
        grid=args.type.lower(),
        settings=f"{args.type}, {imatrix}; linears: {mixture}; embeddings {head}",
        bits_per_weight=spent / kinds.total(),
        megabytes=(out / "quantized.gguf").stat().st_size / 1e6,
    )


if __name__ == "__main__":
    main()
