"""What a converted checkpoint takes along unchanged: the files besides weights that belong to a model.

Folders in which people train, convert and download hold more than that: optimizer states, other formats, logs, secrets.
So it is a list of kinds that is taken along, and whatever else lies there stays behind, and is named. Files are looked
for on top of the folder; below it only templates and code are, whose names say so.
"""

import ast
import logging
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bridge.formats import check_is_itself
from bridge.huggingface.read_json import read_object
from bridge.huggingface.regular_files import file_inside, stays_inside
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX
from bridge.jobs.escaped import escaped

# By kind, patterns of names in lower case.
KINDS: dict[str, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "tokenizer*.model", "tokenizer.model.v*", "sentencepiece*.model",
        "spiece*.model", "spm*.model", "*.spm", "*bpe.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt",
        "vocab.bpe", "encoder.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    ),
    "chat template": ("*.jinja", "chat_template.json", "chat_templates/*.jinja", "additional_chat_templates/*.jinja"),
    "generation": ("generation_config.json",),
    "processor": (
        "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
        "video_preprocessor_config.json", "feature_extractor_config.json",
    ),
    "licence": (
        "license*", "licence*", "*_license", "*_license.*", "*-license", "*-license.*", "notice*", "copying*",
        "use_policy*", "third_party*notice*",
    ),
    "model card": ("readme*", "model_card*", "modelcard*", "configuration.json"),
}  # fmt: skip
# These name the modules of a model's own code, under auto_map.
HAVE_AUTO_MAP = (CONFIG_NAME, "tokenizer_config.json", *KINDS["processor"])
MOST_NAMED = 8

_PATTERNS = [pattern for patterns in KINDS.values() for pattern in patterns]
_OPENED = {pattern.partition("/")[0] for pattern in _PATTERNS if "/" in pattern}
_log = logging.getLogger(__name__)


class Companions(NamedTuple):
    """`carried` are files relative to the folder; `left_behind` the names of what stays, folders with a slash."""

    carried: list[Path]
    left_behind: list[str]


def companions(folder: Path) -> Companions:
    """Which files belong to the model, and which stay behind; both sorted, hidden ones last.

    Weights, their index and config.json are in neither list.

    Raises:
        ValueError: one that belongs to it cannot be taken along: a link that leads out of the checkpoint, to a folder
            or to nothing, a file that may not be read, a FIFO, a socket, a device; or what stands in for a file that
            was not downloaded.
        OSError: a folder cannot be listed.
    """
    code = _code(folder)
    opened = _OPENED | {str(parent) for path in code for parent in PurePosixPath(path).parents}
    found = Companions([], [])
    for name in _entries(folder, "", opened):
        if name in code or _belongs(name):
            if file_inside(folder, name).st_size or name.endswith(".json"):  # a list of merges may be empty
                check_is_itself(folder / name)
            found.carried.append(Path(name))
        else:
            found.left_behind.append(name)
    return Companions(sorted(found.carried), sorted(found.left_behind, key=lambda name: (name.startswith("."), name)))


def say_left_behind(names: list[str]) -> None:
    """One line in the log, if anything stays behind."""
    if names:
        _log.warning("left behind: %s", named(names))


def named(names: list[str]) -> str:
    """The first of some names, which do nothing to a terminal, and how many more there are."""
    shown = [escaped(name) for name in names[:MOST_NAMED]]
    return ", ".join(shown) + (f", {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _belongs(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    depth = name.count("/")
    return not hidden and any(
        fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS if pattern.count("/") == depth
    )


def _entries(folder: Path, below: str, opened: set[str]) -> Iterator[str]:
    """What is in a folder, but for weights, index and config; of folders in it only `opened` ones are looked into."""
    with os.scandir(folder / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = below + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder, f"{name}/", opened) if name in opened else [f"{name}/"]
            elif entry.is_symlink() and name in opened:
                file_inside(folder, name)  # raises: a link to a folder of templates or code
            elif name not in (CONFIG_NAME, INDEX_NAME) and not name.endswith(SHARD_SUFFIX):
                yield name


def _code(folder: Path) -> set[str]:
    """The modules that auto_map names and those that they import from beside them, if they are there."""
    pending = []
    for name in HAVE_AUTO_MAP:
        if os.path.lexists(folder / name):
            file_inside(folder, name)
            references = _references(read_object(folder / name).get("auto_map"))
            own = (one for one in references if "--" not in one)  # the others are in another repository
            pending += [f"{one.rpartition('.')[0].replace('.', '/')}.py" for one in own]
    found: set[str] = set()
    while pending:
        path = pending.pop()
        if path not in found and stays_inside(path) and os.path.lexists(folder / path):
            found.add(path)
            file_inside(folder, path)
            pending += _relative_imports(path, (folder / path).read_bytes())
    return found


def _references(value: Any) -> list[str]:
    """The strings in an auto_map: "module.Class", alone or in a list."""
    if isinstance(value, dict | list):
        return [one for item in (value.values() if isinstance(value, dict) else value) for one in _references(item)]
    return [value] if isinstance(value, str) else []


def _relative_imports(path: str, source: bytes) -> list[str]:
    """The files that a module may mean by its relative imports; none of a file that is no Python of this version."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(PurePosixPath(path).parents):
            continue
        here = PurePosixPath(path).parents[node.level - 1]
        module = here.joinpath(*(node.module or "").split("."))
        for target in (module, *(module / alias.name for alias in node.names)):
            found += [f"{target}.py", f"{target}/__init__.py"]
    return found
