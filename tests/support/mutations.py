"""Mutations of a checkpoint's files, and what opening and reading the mutated ones may do.

This runs in a process without the type checks of test time (`support.forks`), for they raise errors of their own.

What cannot be noticed, because the format has nothing to notice it by, is not among the mutations: two tensors of one
shape that change places in a header, or bfloat16 declared float16.
"""

import copy as copying
import json
import math
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SafetensorsFolder
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from bridge.torch_dist.reader import TRACKER
from reference.names import all_names
from reference.weights import Dialect

SECONDS, BYTES = 5, 2**30
EXAMPLES = partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


class TooLong(BaseException):
    """It would have gone on."""


@contextmanager
def bounded() -> Iterator[None]:
    """Neither five seconds nor a gigabyte more than now."""

    def late(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ----------------------------------------------------------------------------------------------------------- mutations

ODD_TEXTS = ["", ".", "..", "/", "a/../..", "x" * 5000, "\0", "\ud800", "model", "F32", "BF16x", "1e400", "-1", "ü"]
ODD_NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e300, -0.0, math.nan, math.inf]
ODD_VALUES = [None, True, False, [], {}, [[]], [{}], {"a": {}}, [1, 2], [None, "x"], [2, 2], *ODD_TEXTS, *ODD_NUMBERS]
ODD_LITERALS = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\xed\xa0\x80",
    b'"\\ud800"', b"0x10", b"01", b"nul", b"//", b"\0", b"\xef\xbb\xbf", b",", b":", b"}", b"]", b'"',
]  # fmt: skip


def paths_in(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where every value inside a JSON value stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths_in(inner, (*at, key))


def change_json(data: bytes, draw: Callable) -> bytes:
    """Another value, no value, or another name, somewhere inside."""
    value = json.loads(data)
    paths = list(paths_in(value))
    (*parents, last) = draw(st.sampled_from(paths))
    inside = value
    for key in parents:
        inside = inside[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "nest", "rename", "twice"]))
    if how == "remove":
        del inside[last]
    elif how == "nest":
        inside[last] = {"a": [inside[last]]}
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(st.sampled_from(ODD_TEXTS))] = inside.pop(last)
    elif how == "twice" and isinstance(inside, dict):
        pair = json.dumps({last: draw(st.sampled_from(ODD_VALUES))})[1:-1]
        text = json.dumps(value)
        spot = draw(st.sampled_from([match.start() for match in re.finditer(r"\{", text)][:50])) + 1
        return f"{text[:spot]}{pair}, {text[spot:]}".encode()
    else:
        inside[last] = draw(st.sampled_from(ODD_VALUES))
    return json.dumps(value).encode()


def change_bytes(data: bytes, draw: Callable) -> bytes:
    """A flipped, lost, doubled or foreign run of bytes."""
    at = draw(st.integers(0, len(data) - 1))
    length = draw(st.sampled_from([1, 1, 1, 2, 5, 40]))
    how = draw(st.sampled_from(["flip", "flip", "cut", "end", "double", "insert", "overwrite"]))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if how == "cut":
        return data[:at] + data[at + length :]
    if how == "end":
        return data[:at]
    if how == "double":
        return data[:at] + data[at : at + length] + data[at:]
    literal = draw(st.sampled_from(ODD_LITERALS))
    return data[:at] + literal + data[at + (len(literal) if how == "overwrite" else 0) :]


def change(data: bytes, draw: Callable) -> bytes:
    """By structure or by bytes."""
    return draw(st.sampled_from([change_json, change_json, change_bytes]))(data, draw)


# ----------------------------------------------------------------------------------------------------------- judgement


class Subject:
    """A copy of a checkpoint, one file of which is mutated at a time, and what its tensors are."""

    def __init__(self, folder: Path, read: Callable[[Path], dict[str, bytes]]):
        self.folder, self.read = folder, read
        self.right = read(folder)
        self.refused = self.accepted = 0

    def judge(self, path: Path, data: bytes, dry_run: Callable[[], object]) -> None:
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            with bounded():
                dry_run()
                found = self.read(self.folder)
        except ValueError as error:
            if type(error) is not ValueError or not str(error).strip():
                raise AssertionError(f"an error from the depths: {error!r}") from error
            self.refused += 1
        else:
            self.accepted += 1
            assert {name: found[name] for name in self.right} == self.right
        finally:
            path.write_bytes(before)


def hf_tensors(folder: Path) -> dict[str, bytes]:
    with SafetensorsFolder(folder) as opened:
        return {
            name: f"{info.dtype} {list(info.shape)}".encode()
            + opened.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, info in opened.tensors.items()
        }


def judge_hf(hf: Subject, name: str, data: bytes) -> None:
    job = ImportJob(str(hf.folder), str(hf.folder.with_name("out")))
    hf.judge(hf.folder / name, data, lambda: import_checkpoint(job, dry_run=True))


@EXAMPLES(max_examples=250)
@given(st.data())
def mutate_config(hf: Subject, data: st.DataObject):
    judge_hf(hf, CONFIG_NAME, change((hf.folder / CONFIG_NAME).read_bytes(), data.draw))


@EXAMPLES(max_examples=200)
@given(st.data())
def mutate_index(hf: Subject, data: st.DataObject):
    judge_hf(hf, INDEX_NAME, change((hf.folder / INDEX_NAME).read_bytes(), data.draw))


@EXAMPLES(max_examples=250)
@given(st.data())
def mutate_header(hf: Subject, data: st.DataObject):
    path = data.draw(st.sampled_from(sorted(hf.folder.glob("*.safetensors"))))
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.integers(0, 9)) == 0:
        said = data.draw(st.sampled_from([0, 1, 7, length - 1, length + 1, len(whole), 2**31, 2**63, 2**64 - 1]))
        judge_hf(hf, path.name, said.to_bytes(8, "little") + whole[8:])
    else:
        header = change(whole[8 : 8 + length], data.draw)
        said = length if data.draw(st.booleans()) else len(header)
        judge_hf(hf, path.name, said.to_bytes(8, "little") + header + whole[8 + length :])


def every_odd_value(hf: Subject):
    """Not at random: each key of config.json, and of the section in it, with each odd value."""
    text = (hf.folder / CONFIG_NAME).read_bytes()
    config = json.loads(text) | {"rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 0.5}
    config |= {"attn_type_list": [1, 1], "some_key_from_the_future": 1, "sliding_window": None}
    judge_hf(hf, CONFIG_NAME, json.dumps(config).encode())
    for parents in ((), ("quantization_config",)):
        section = config[parents[0]] if parents else config
        for key in section:
            for value in ODD_VALUES:
                changed = copying.deepcopy(config)
                (changed[parents[0]] if parents else changed)[key] = value
                judge_config(hf, changed)
    for key in ("rope_theta", "partial_rotary_factor", "rope_type"):
        for value in ODD_VALUES:
            judge_config(hf, config | {"rope_parameters": {key: value}})


def judge_config(hf: Subject, config: dict[str, Any]) -> None:
    judge_hf(hf, CONFIG_NAME, json.dumps(config).encode())


# ---------------------------------------------------------------------------------------------------------- torch_dist


def torch_dist_tensors(folder: Path) -> dict[str, bytes]:
    weights = MegatronCheckpoint(folder)
    found = {name: weights.read_weight(name) for name in all_names(weights.config, Dialect.HF_DISK)}
    return {name: value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for name, value in found.items()}


def judge_torch_dist(subject: Subject, path: Path, data: bytes) -> None:
    job = ExportJob(str(subject.folder), str(subject.folder.with_name("out")), scales="fresh")
    subject.judge(path, data, lambda: export_checkpoint(job, dry_run=True))


@EXAMPLES(max_examples=60)
@given(st.data())
def mutate_metadata(torch_dist: Subject, data: st.DataObject):
    path = torch_dist.folder / "iter_0000001" / ".metadata"
    judge_torch_dist(torch_dist, path, change_bytes(path.read_bytes(), data.draw))


@EXAMPLES(max_examples=60)
@given(st.data())
def mutate_config_beside(torch_dist: Subject, data: st.DataObject):
    path = torch_dist.folder / "hugging_face" / CONFIG_NAME
    judge_torch_dist(torch_dist, path, change(path.read_bytes(), data.draw))


def every_odd_size(torch_dist: Subject) -> None:
    """Sizes in the config.json beside a distributed checkpoint.

    A smaller vocabulary is not wrong: what a checkpoint holds beyond it is padding.
    """
    path = torch_dist.folder / "hugging_face" / CONFIG_NAME
    config = json.loads(path.read_bytes())
    for key in [key for key, value in config.items() if isinstance(value, int)]:
        for value in [value for value in ODD_NUMBERS if key != "vocab_size" or not 0 < value < config[key]]:
            judge_torch_dist(torch_dist, path, json.dumps(config | {key: value}).encode())


TRACKERS = [b"", b"2", b"-1", b"0", b"1" * 400, b"\xff\xfe1", b"1\0", b"release", b"../x", b"1\n", b" 1 ", b"nan"]


def every_tracker(torch_dist: Subject) -> None:
    """What the tracker file may say."""
    for text in [*TRACKERS, "\u0663".encode()]:
        judge_torch_dist(torch_dist, torch_dist.folder / TRACKER, text)


MUTATIONS = {
    "config": (hf_tensors, mutate_config),
    "index": (hf_tensors, mutate_index),
    "header": (hf_tensors, mutate_header),
    "each config key": (hf_tensors, every_odd_value),
    "metadata": (torch_dist_tensors, mutate_metadata),
    "config beside": (torch_dist_tensors, mutate_config_beside),
    "each size beside": (torch_dist_tensors, every_odd_size),
    "tracker": (torch_dist_tensors, every_tracker),
}


def judge_all(kind: str, folder: Path) -> tuple[int, int]:
    """Raises what is wrong; else how many mutations were refused, and how many did no harm."""
    read, mutate = MUTATIONS[kind]
    subject = Subject(folder, read)
    mutate(subject)
    return subject.refused, subject.accepted
