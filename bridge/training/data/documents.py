"""A file of training data, one document after another: token ids, and which of them are trained on.

    {"text": "..."}                                     all tokens
    {"messages": [{"role": ..., "content": ...}, ...]}  the assistant's turns; beside it may be "tools"
    {"tokens": [1, 2, 3]}                               all tokens, as they are

A `.txt` file is one document. Text gets the tokenizer's end-of-sequence token at its end; conversations get what their
template gives. A message with `"weight": 0` is not trained on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bridge.training.data.tokenizer import Tokenizer

KINDS = ("text", "messages", "tokens")


class Document(NamedTuple):
    """Token ids, and for each whether predicting it is trained."""

    tokens: np.ndarray
    trained: np.ndarray


def read_documents(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Iterator[Document]:
    """The documents of a `.jsonl` or `.txt` file.

    Raises:
        ValueError: a line is not one of the three kinds, needs a tokenizer and there is none, or has a token that the
            vocabulary has not; names the file and line.
    """
    if path.suffix == ".txt":
        text = _text(path.read_bytes(), str(path))
        yield _checked(_of_text(text, tokenizer, str(path)), vocab_size, str(path))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield _checked(_of_line(line, tokenizer, where), vocab_size, where)


def needs_tokenizer(path: Path) -> bool:
    """Whether a file has text: all but `.bin`, and `.jsonl` whose first line has token ids."""
    if path.suffix != ".jsonl":
        return path.suffix == ".txt"
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"{}")
    return "tokens" not in _object(first, f"{path}: line 1")


def _of_line(line: bytes, tokenizer: Tokenizer | None, where: str) -> Document:
    found = _object(line, where)
    kinds = [kind for kind in KINDS if kind in found]
    if len(kinds) != 1:
        raise ValueError(f"{where}: expected one of the keys {', '.join(KINDS)}, found {', '.join(found) or 'none'}")
    value = found[kinds[0]]
    if kinds[0] == "text":
        if not isinstance(value, str):
            raise ValueError(f"{where}: text must be a string, found {type(value).__name__}")
        return _of_text(value, tokenizer, where)
    if kinds[0] == "tokens":
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise ValueError(f"{where}: tokens must be a list of integers")
        try:
            tokens = np.array(value, dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"{where}: {max(value, key=abs)} is a token of no vocabulary") from error
        return Document(tokens, np.ones(len(tokens), dtype=bool))
    ids, trained = _need(tokenizer, where).conversation(value, where, tools=found.get("tools"))
    return Document(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))


def _of_text(text: str, tokenizer: Tokenizer | None, where: str) -> Document:
    tokens = np.array(_need(tokenizer, where).text(text, where), dtype=np.int64)
    return Document(tokens, np.ones(len(tokens), dtype=bool))


def _need(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(f"{where}: is text, and the first line of the file has token ids; give files of one kind each")
    return tokenizer


def _checked(document: Document, vocab_size: int, where: str) -> Document:
    tokens = document.tokens
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(
            f"{where}: token {worst}, and the model's vocabulary has 0 to {vocab_size - 1}; the tokenizer is another "
            "model's, or the tokens were made for one"
        )
    return document


def _object(line: bytes, where: str) -> dict[str, Any]:
    text = _text(line, where)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of too many digits
        raise ValueError(f"{where}: is not JSON ({error}); each line is one object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, found {type(found).__name__}")
    return found


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors write a mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 ({error}); convert the file") from error
