"""Mutated inputs end in a clear error or a right result, never in another exception, a hang or a wrong tensor.

What cannot be noticed, because the format has nothing to notice it by, is not among the mutations: two tensors of one
shape that change places in a header, or bfloat16 declared float16.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults_mutations import MUTATIONS, judge_all
from support.faults_runs import call, run, warm_server

from bridge.convert.hf_to_torch_dist import ImportJob

AT_LEAST = {"config": 250, "index": 200, "header": 250, "each config key": 900, "metadata": 60, "tracker": 12}


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("mutated")
    with warm_server(checkpoint):
        assert run(ImportJob(str(checkpoint), str(folder / "torch_dist"))).error is None
        yield {"hf": checkpoint, "torch_dist": folder / "torch_dist"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind.startswith("each") else kind for kind in MUTATIONS]
)
def test_mutations(folders: dict[str, Path], tmp_path: Path, kind: str):
    source = folders["torch_dist" if kind in ("metadata", "config beside", "each size beside", "tracker") else "hf"]
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    outcome = call(judge_all, kind, copy)
    assert outcome.error is None, outcome.error[1]
    refused, accepted = outcome.summary
    print(f"{kind}: {refused} refused, {accepted} without harm")
    assert refused + accepted >= AT_LEAST.get(kind, 50)
    assert refused > 0
