"""Byte-level text to train on: the machine's own Python standard library, or any file or folder."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from widthwise.derive.errors import DeriveError

VOCABULARY = 256
HELD_OUT = 10  # one file in so many
LIMIT = 64 * 2**20  # bytes; more than any run here reads
LEAST = 2**11  # bytes of either part; a window must fit in


@dataclass(frozen=True)
class Corpus:
    """Bytes [N] (uint8) to train on and to validate on; no file gives to both."""

    name: str
    train: Tensor
    valid: Tensor

    def batches(self, size: int, length: int, seed: int, *, split: str = "train") -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and next tokens, int64 [size, length] each, from random places, for ever."""
        text = self.train if split == "train" else self.valid
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(length + 1)
        while True:
            starts = torch.randint(0, len(text) - length, (size, 1), generator=generator)
            window = text[starts + offsets].long()
            yield window[:, :-1], window[:, 1:]


def corpus(path: Path | None = None) -> Corpus:
    """The text of a file, of all files of a folder, or (None) of the standard library's Python sources.

    Folders are split by file, one in ten held out by a hash of its name, so that the split is the same everywhere; a
    single file gives its last tenth, and so does a folder of so few files that none or too little was held out.

    Raises:
        DeriveError: when there is nothing to read, or not enough of it.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    try:
        parts = _file(root) if root.is_file() else _folder(root, "*.py" if path is None else "*")
    except OSError as error:
        raise DeriveError(
            f"cannot read {error.filename}: {error.strerror}", cure="give a file or a folder of text"
        ) from None
    if min(map(len, parts)) < LEAST:
        raise DeriveError(
            f"{root} has {sum(map(len, parts))} bytes of text, too few to train on and validate on",
            cure="give a larger file, or a folder with more files",
        )
    train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus("the Python standard library" if path is None else root.name, train, valid)


def _file(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as stream:
        return _split(stream.read(LIMIT))


def _split(text: bytes) -> tuple[bytes, bytes]:
    kept = len(text) - len(text) // HELD_OUT
    return text[:kept], text[kept:]


def _folder(root: Path, pattern: str) -> tuple[bytes, bytes]:
    if not root.is_dir():
        what = "is neither a file nor a folder" if root.exists() else "does not exist"
        raise DeriveError(f"{root} {what}", cure="give a file or a folder of text")
    train, valid = bytearray(), bytearray()
    for file in sorted(root.rglob(pattern)):
        name = file.relative_to(root).as_posix()
        if "site-packages" in name or not file.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        with file.open("rb") as stream:
            (train if digest[0] % HELD_OUT else valid).extend(stream.read(LIMIT))
        if len(train) + len(valid) > LIMIT:
            break
    if min(len(train), len(valid)) < LEAST:
        return _split(bytes(train + valid))
    return bytes(train), bytes(valid)
