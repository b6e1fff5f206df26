"""READMEs as tests see them: code blocks and what each needs, links, and names of ours in the text."""

import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

LANGUAGES = ("python", "bash", "text")  # the last is what a program prints
MARKER = re.compile(r"<!-- (needs|file): ([^;]+?)(?:; .+)? -->")
FENCE = re.compile(r"```(\w*)\n")
NAME = re.compile(r"`((?:reference|compiled|bridge)(?:\.[A-Za-z_]\w*)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block and the marker above it.

    `<!-- needs: gpu; why -->`: what the block cannot run without. `<!-- file: train.py -->`: a program, which a command
    further down starts under that name.
    """

    readme: Path
    line: int  # of the README, where the code starts
    language: str
    code: str
    need: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}"


def blocks(readme: Path) -> list[Block]:
    """The fenced blocks of a README, from top to bottom.

    Raises:
        ValueError: a block has another language than LANGUAGES or does not end, or a marker has no block below it.
    """
    found, lines, markers = [], readme.read_text(encoding="utf-8").splitlines(keepends=True), {}
    at = 0
    while at < len(lines):
        marker, fence = MARKER.fullmatch(lines[at].strip()), FENCE.fullmatch(lines[at])
        if marker:
            markers[marker[1]] = marker[2]
        elif lines[at].lstrip().startswith(("<!--", "```")) and not fence:
            raise ValueError(f"{readme}:{at + 1}: neither a marker nor a fence of a block: {lines[at].strip()}")
        elif fence:
            end = next((n for n in range(at + 1, len(lines)) if lines[n].rstrip() == "```"), None)
            if fence[1] not in LANGUAGES or end is None:
                raise ValueError(f"{readme}:{at + 1}: a block must have an end and be one of {', '.join(LANGUAGES)}")
            code = "".join(lines[at + 1 : end])
            found.append(Block(readme, at + 2, fence[1], code, markers.get("needs"), markers.get("file")))
            at, markers = end, {}
        elif markers:
            raise ValueError(f"{readme}:{at + 1}: a marker must stand right above its block")
        at += 1
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block, lines joined where a backslash ends one; comments left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]


def words_of(command: str) -> list[str] | None:
    """The words of a command that needs no shell; None for one that does."""
    words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
    shell = any(set(word) <= set("();<>|&") for word in words) or "$" in command or "`" in command
    return None if shell else shlex.split(command, comments=True)


def own_arguments(command: str) -> list[str] | None:
    """What follows `minimax-m2` in a command, also behind torchrun or in a chain; None where it is not called."""
    words = shlex.split(command, comments=True)
    for at, word in enumerate(words):
        if Path(word).name == "minimax-m2":
            rest = words[at + 1 :]
            return rest[: rest.index("&&")] if "&&" in rest else rest
    return None


def missing_links(readme: Path) -> list[str]:
    """Links to files and folders that are not there."""
    targets = [link.split("#")[0] for link in LINK.findall(prose(readme)) if "://" not in link]
    return [target for target in targets if not (readme.parent / target).exists()]


def unknown_names(readme: Path) -> list[str]:
    """Dotted names of ours in the text that are neither a module nor in one. What a table calls "old" may be gone."""
    return [name for name in NAME.findall(_without_old_names(prose(readme))) if not _exists(name)]


def prose(readme: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _without_old_names(text: str) -> str:
    """Tables whose first column is headed "old" lose that column."""
    kept, is_old = [], False
    for line in text.splitlines():
        is_old = line.startswith("| old ") or (is_old and line.startswith("|"))
        kept.append(line.split("|", 2)[2] if is_old else line)
    return "\n".join(kept)


def _exists(name: str) -> bool:
    parts = name.split(".")
    if _is_module(name):  # which need not be imported: a plug-in imports its host
        return True
    for size in range(len(parts) - 1, 0, -1):
        if _is_module(".".join(parts[:size])):
            found: Any = import_module(".".join(parts[:size]))
            for part in parts[size:]:
                if not hasattr(found, part):
                    return False
                found = getattr(found, part)
            return True
    return False


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False
