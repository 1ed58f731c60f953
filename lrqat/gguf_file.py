"""The GGUF container, read: metadata and where each tensor lies. Written for files that nobody has checked.

    4 bytes   "GGUF"
    u32       version, 2 or 3
    u64 u64   number of tensors, number of metadata pairs
    pairs     string key, u32 value type, value;  string = u64 length, UTF-8;  array = u32 type, u64 length, values
    tensors   string name, u32 number of dimensions, u64 each (innermost first), u32 ggml type, u64 offset
    padding   to a multiple of `general.alignment` (32)
    data      tensors, at offsets relative to this place

Every count is compared with the bytes that are left before anything is allocated or looped over. `gguf.GGUFReader`
does neither: an array that claims 2^60 bytes fills its memory. Little endian only.

Source: ggml-org/ggml docs/gguf.md.

Refuses: anything that does not lie within the file, or is not what the table says.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrqat.errors import LrqatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SMALLEST_PAIR = 8 + 4 + 1  # bytes of an empty key, a type and a u8
SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes of an empty name, no dimensions, a type and an offset


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.

    Attributes:
        shape: outermost first, as torch and numpy have it.
        ggml_type: number of the type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GgufFile:
    """An open GGUF file: `metadata` and `tensors` by name; bytes when asked for.

    Raises:
        LrqatError: the file is not a whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise LrqatError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise LrqatError(f"{path}: cannot be read ({error}); expected a GGUF file") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from None

    def check(self, name: str, nbytes: int) -> int:
        """`nbytes`, if the file has so many from the beginning of this tensor on."""
        beyond = self.tensors[name].offset + nbytes - len(self._bytes)
        if beyond > 0:
            raise self._damaged(f"{name} reaches {beyond} bytes past its end")
        return nbytes

    def read(self, name: str, nbytes: int, start: int = 0) -> bytearray:
        """`nbytes` of a tensor, from byte `start` of it on."""
        end = self.tensors[name].offset + self.check(name, start + nbytes)
        return bytearray(memoryview(self._bytes)[end - nbytes : end])

    def field(self, key: str, kind: type) -> Any:
        """A metadata value of the type that is expected."""
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise self._damaged(f"{key} is {value!r}, expected {kind.__name__}")
        return value

    def _parse(self) -> None:
        if self._bytes[:4] != MAGIC:
            raise LrqatError(f"{self.path}: not a GGUF file (it begins with {self._bytes[:4]!r})")
        self._at = 4
        if (version := self._scalar("I")) not in VERSIONS:
            raise LrqatError(f"{self.path}: GGUF version {version}, expected 2 or 3 (little endian); convert it again")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        self._claim(pairs, SMALLEST_PAIR, "metadata pairs")
        for _ in range(pairs):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"metadata {key!r} occurs twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self._claim(tensors, SMALLEST_TENSOR, "tensors")
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, expected a power of two")
        data = self._at + -self._at % alignment
        for name, info in found:
            if name in self.tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            if info.offset % alignment or data + info.offset > len(self._bytes):
                raise self._damaged(f"tensor {name!r} begins outside of it")
            self.tensors[name] = TensorInfo(info.shape, info.ggml_type, data + info.offset)

    def _tensor(self) -> tuple[str, TensorInfo]:
        name = self._string()
        if (dims := self._scalar("I")) > MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {dims} dimensions")
        shape = [self._scalar("Q") for _ in range(dims)]
        return name, TensorInfo(tuple(reversed(shape)), self._scalar("I"), self._scalar("Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            if item == STRING:
                self._claim(length, 8, "strings")
                return [self._string() for _ in range(length)]
            if item in SCALARS:
                size = struct.calcsize(SCALARS[item])
                self._claim(length, size, "array values")
                self._at += length * size
                return list(struct.unpack_from(f"<{length}{SCALARS[item]}", self._bytes, self._at - length * size))
            raise self._damaged(f"array of value type {item}")
        if kind not in SCALARS:
            raise self._damaged(f"value type {kind}")
        return self._scalar(SCALARS[kind])

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._bytes, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._claim(length, 1, "bytes of a string")
        self._at += length
        return self._bytes[self._at - length : self._at].decode("utf-8")

    def _claim(self, count: int, size: int, what: str) -> None:
        if count * size > len(self._bytes) - self._at:
            raise self._damaged(f"it claims {count} {what} where {len(self._bytes) - self._at} bytes are left")

    def _damaged(self, why: str) -> LrqatError:
        return LrqatError(f"{self.path}: not a whole GGUF file ({why}); copy or export it again")
