"""A JSON object in a file of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from bridge.formats import check_is_itself
from bridge.huggingface.regular_files import regular_file


def read_object(path: Path) -> dict[str, Any]:
    """What is in the file.

    Raises:
        ValueError: it cannot be read, or is not JSON, or not an object; names the file.
    """
    regular_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        check_is_itself(path)
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
