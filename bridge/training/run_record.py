"""What a run was begun with, `run.json` in its folder: a run that goes on must have the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge.jobs.durable import json_bytes, write_bytes
from bridge.training.settings import TrainJob
from reference.config import ModelConfig

NAME = "run.json"
_SOURCES = ("model", "data", "tokenizer", "random")  # paths may be spelt otherwise, and what they name is compared


def make_record(job: TrainJob, config: ModelConfig, data: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that decide the numbers, the model, and fingerprints of the data."""
    settings = {name: value for name, value in job.decisive().items() if name not in _SOURCES}
    return json.loads(json.dumps({"settings": settings, "model": asdict(config), "data": data}))


def check_record(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a run is in the folder already, begun with the same; on rank 0.

    Raises:
        ValueError: it was begun with other settings, another model or other data; or files of something else are there.
    """
    path = folder / NAME
    if not path.is_file():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name != "data") if folder.is_dir() else []
        if others:
            raise ValueError(f"{folder}: holds {', '.join(others[:3])} and no {NAME}, so is no run's; write elsewhere")
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); start anew in another --out") from error
    for part, what in (("settings", "setting"), ("model", "size of the model")):
        for name, value in record[part].items():
            if found[part].get(name) != value:
                raise ValueError(
                    f"{folder}: this run was begun with {what} {name} = {found[part].get(name)!r}, and now it is "
                    f"{value!r}; go on with the same, or start another run, with --model {folder} from its weights"
                )
    if found["data"] != record["data"]:
        raise ValueError(
            f"{folder}: this run was begun with other data, {_amounts(found)}, and now it is {_amounts(record)}; go on "
            f"with the same files in the same order, or start another run, with --model {folder} from its weights"
        )
    return True


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / NAME, json_bytes(record))


def _amounts(record: dict[str, Any]) -> str:
    return ", ".join(f"{one['tokens']} tokens ({one['fingerprint'][:8]})" for one in record["data"])
