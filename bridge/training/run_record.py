"""What a run was begun with, `run.json` in its folder: a run that goes on from a checkpoint must have the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge.jobs.durable import json_bytes, write_bytes
from bridge.model.layer_spec import Backend
from bridge.training.settings import TrainJob
from reference.config import ModelConfig

NAME = "run.json"
_LAYERS = {"local": "megatron-core's layers, without a GPU", "transformer_engine": "Transformer Engine's layers"}
_SOURCES = ("model", "data", "tokenizer", "random")  # paths may be spelt otherwise, and what they name is compared


def make_record(job: TrainJob, config: ModelConfig, backend: Backend) -> dict[str, Any]:
    """The settings that decide the numbers, the model, and whose layers it has.

    `data` has the fingerprints of the data, once it is read.
    """
    settings = {name: value for name, value in job.decisive().items() if name not in _SOURCES}
    record = {"settings": settings, "model": asdict(config), "layers": backend, "data": []}
    return json.loads(json.dumps(record))


def check_folder(folder: Path) -> None:
    """A folder that is a run's, or may become one: it is not there, is empty, or has its data or `run.json`.

    Raises:
        ValueError: it is a file; files of something else are there, or another's `run.json`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a folder or nothing; write elsewhere")
    if (folder / NAME).is_file():
        read_record(folder)
        return
    own = ("data", f".{NAME}.tmp")  # the latter of a start that was killed
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in own) if folder.is_dir() else []
    if others:
        raise ValueError(f"{folder}: holds {', '.join(others[:3])} and no {NAME}, so is no run's; write elsewhere")


def read_record(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with.

    Raises:
        ValueError: that is damaged, or something else.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_bytes())
        shapes = [(dict, found["settings"]), (dict, found["model"]), (list, found["data"])]
        if all(isinstance(value, kind) for kind, value in shapes):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: is damaged, or no run's; copy it from a backup, or write elsewhere")


def check_settings(folder: Path, found: dict[str, Any], record: dict[str, Any]) -> None:
    """A run that was begun goes on with the same settings and a model of the same sizes and layers.

    Raises:
        ValueError: one is another; names it.
    """
    before = found.get("layers", record["layers"])  # runs of earlier versions do not say
    if before != record["layers"]:
        raise ValueError(
            f"{folder}: this run was begun with {_LAYERS[before]}, and this host has {_LAYERS[record['layers']]}, "
            f"whose checkpoints are others; go on on such a host, or start another run, with --model {folder} from its "
            "weights"
        )
    for part, what in (("settings", "setting"), ("model", "size of the model")):
        for name, value in record[part].items():
            if found[part].get(name) != value:
                raise ValueError(
                    f"{folder}: this run was begun with {what} {name} = {found[part].get(name)!r}, and now it is "
                    f"{value!r}; go on with the same, or start another run, with --model {folder} from its weights"
                )


def check_data(folder: Path, found: dict[str, Any], record: dict[str, Any]) -> None:
    """A run that was begun goes on with the same data.

    Raises:
        ValueError: it is other data.
    """
    if found["data"] != record["data"]:
        raise ValueError(
            f"{folder}: this run was begun with other data, {_amounts(found)}, and now it is {_amounts(record)}; go on "
            f"with the same files in the same order, or start another run, with --model {folder} from its weights"
        )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    write_bytes(folder / NAME, json_bytes(record))


def _amounts(record: dict[str, Any]) -> str:
    return ", ".join(f"{one['tokens']} tokens ({one['fingerprint'][:8]})" for one in record["data"])
