"""Mutated inputs end in a clear error or a right result, never in another exception, a hang or a wrong tensor."""

import shutil
from pathlib import Path

import pytest
from support.forks import call
from support.mutations import MUTATIONS, judge_all

AT_LEAST = {"config": 250, "index": 200, "header": 250, "each config key": 900, "metadata": 60, "tracker": 12}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind.startswith("each") else kind for kind in MUTATIONS]
)
def test_mutations(checkpoint: Path, imported: Path, tmp_path: Path, kind: str):
    source = imported if kind in ("metadata", "config beside", "each size beside", "tracker") else checkpoint
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    refused, accepted = call(judge_all, kind, copy).get()
    print(f"{kind}: {refused} refused, {accepted} without harm")
    assert refused + accepted >= AT_LEAST.get(kind, 50)
    assert refused > 0
