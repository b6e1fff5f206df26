"""Files of training data as megatron-core's indexed datasets, `.bin` and `.idx`, made once and kept beside the run.

The indexed dataset has room for token ids only, so a token that is not trained on is kept as -(id + 1). Files that are
indexed datasets already are read where they are.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from bridge.jobs.durable import json_bytes, sync, write_bytes
from bridge.jobs.os_errors import os_errors_of
from bridge.jobs.progress import Progress, no_progress
from bridge.training.data.documents import Document, needs_tokenizer, read_documents
from bridge.training.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt", ".bin")
INSTEAD = {".idx": "; name the .bin beside it", ".gz": "; unpack it"}
SCANNED = 2**24  # tokens of a .bin that are looked at at a time


class Source(NamedTuple):
    """An indexed dataset: path without suffix, tokens, how many of them are trained on, and what it was made from."""

    prefix: str
    tokens: int
    trained: int
    fingerprint: str


def check_files(paths: Sequence[str]) -> None:
    """Every file is there, is not empty, and is of a kind that is read.

    Raises:
        ValueError: one is not; names it.
    """
    for path in map(Path, paths):
        if path.suffix not in SUFFIXES:
            hint = INSTEAD.get(path.suffix, "")
            raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}{hint}")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name the files in it")
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if not path.stat().st_size:
            raise ValueError(f"{path}: is empty; give data to train on, or leave it out")
        if path.suffix == ".bin" and not path.with_suffix(".idx").is_file():
            raise ValueError(f"{path}: its index {path.with_suffix('.idx').name} is not beside it; copy it there")


def need_tokenizer(paths: Sequence[str]) -> bool:
    """Whether any of the files has text."""
    return any(needs_tokenizer(Path(path)) for path in paths)


def make_sources(
    paths: Sequence[str],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    cache: Path,
    *,
    progress: Progress = no_progress,
) -> list[Source]:
    """The files as indexed datasets; those that an earlier call finished in `cache` are taken as they are.

    Raises:
        ValueError: as `read_documents`; a `.bin` has a token that the vocabulary has not.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return [_source(Path(path), tokenizer, vocab_size, cache, progress) for path in paths]


def _source(path: Path, tokenizer: Tokenizer | None, vocab_size: int, cache: Path, progress: Progress) -> Source:
    needs = tokenizer if needs_tokenizer(path) else None
    read = [path, path.with_suffix(".idx")] if path.suffix == ".bin" else [path]
    made_from = {
        "content": [_digest(file) for file in read],
        "kind": path.suffix,
        "tokenizer": needs and needs.fingerprint,
        "vocab_size": vocab_size,
    }
    fingerprint = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    record = cache / f"{fingerprint[:16]}.json"
    prefix = path.with_suffix("") if path.suffix == ".bin" else cache / fingerprint[:16]
    kept = _kept(record, prefix)
    if kept is not None:
        return kept
    if path.suffix == ".bin":
        source = _scanned(path, vocab_size, fingerprint)
    else:
        source = _indexed(read_documents(path, needs, vocab_size), path, prefix, fingerprint, progress)
    write_bytes(record, json_bytes(source._asdict()))  # last: what it names is whole
    return source


def _kept(record: Path, prefix: Path) -> Source | None:
    """What an earlier call made, wherever the file, or the run, was then; None if it is not whole."""
    try:
        source = Source(**json.loads(record.read_bytes()))
        index = IndexedDataset(str(prefix)).index  # kept: its arrays are views of a file that it closes
        counted = int(index.sequence_lengths.sum())
        written = Path(f"{prefix}.bin").stat().st_size
        whole = counted == source.tokens and written == counted * np.dtype(index.dtype).itemsize
    except Exception:  # the index asserts, and numpy raises of its own
        return None
    return source._replace(prefix=str(prefix)) if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _indexed(documents: Iterator[Document], path: Path, prefix: Path, fingerprint: str, progress: Progress) -> Source:
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    tokens = trained = 0
    try:
        with os_errors_of(binary):
            builder = IndexedDatasetBuilder(str(binary), dtype=np.int32)
            for document in progress(documents, f"tokenise {path.name}", _lines(path)):
                if not len(document.tokens):
                    continue
                kept = np.where(document.trained, document.tokens, -document.tokens - 1)
                builder.add_document(kept, [len(kept)])  # pyright: ignore[reportArgumentType]  # it makes an array of it
                tokens, trained = tokens + len(kept), trained + int(document.trained.sum())
            builder.finalize(str(index))
    except BaseException:
        for file in (binary, index):
            file.unlink(missing_ok=True)
        raise
    for file in (binary, index):
        sync(file)
    return Source(str(prefix), tokens, trained, fingerprint)


def _lines(path: Path) -> int:
    if path.suffix == ".txt":
        return 1
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _scanned(path: Path, vocab_size: int, fingerprint: str) -> Source:
    """A dataset that someone else made: every token is looked at."""
    prefix = str(path.with_suffix(""))
    try:
        index = IndexedDataset(prefix).index
    except Exception as error:  # it asserts, and numpy raises of its own
        raise ValueError(f"{prefix}.idx: is not megatron-core's index ({error}); make both anew") from error
    tokens, trained = int(index.sequence_lengths.sum()), 0
    values = np.memmap(path, dtype=index.dtype, mode="r")
    if len(values) != tokens:
        raise ValueError(f"{path}: has {len(values)} tokens, its index says {tokens}; copy both files again")
    for start in range(0, tokens, SCANNED):
        part = values[start : start + SCANNED].astype(np.int64)
        worst = np.where(part < 0, -part - 1, part).max()
        if worst >= vocab_size:
            raise ValueError(
                f"{path}: token {worst}, and the model's vocabulary has 0 to {vocab_size - 1}; it was made with "
                "another model's tokenizer"
            )
        trained += int((part >= 0).sum())
    return Source(prefix, tokens, trained, fingerprint)


def check_amount(paths: Sequence[str], sources: Sequence[Source], seq_length: int) -> None:
    """There is a sequence in every file, and something in each to train on.

    Raises:
        ValueError: there is not.
    """
    for path, source in zip(paths, sources, strict=True):
        if source.tokens <= seq_length:
            raise ValueError(
                f"{path}: has {source.tokens} tokens, fewer than one sequence of {seq_length} and the next "
                "token; give more data, or a smaller --seq-length"
            )
        if not source.trained:
            raise ValueError(
                f"{path}: no token in it is trained on; leave it out, or give the assistant something to say"
            )


def describe(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """What decides the samples: of a run that goes on it must be the same."""
    return [{"tokens": source.tokens, "fingerprint": source.fingerprint} for source in sources]
