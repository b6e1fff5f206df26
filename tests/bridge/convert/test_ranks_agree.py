"""Ranks that were started with different jobs or files say so before the first unit, and leave nothing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import W2, edit_tensors
from support.folders import contents
from support.ranks import RankPool
from torch import distributed

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint

WORLD = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD) as ranks:
        yield ranks


def convert(jobs: list[ImportJob | ExportJob]) -> str:
    """Each rank does its own job; what it says."""
    job = jobs[distributed.get_rank()]
    try:
        import_checkpoint(job) if isinstance(job, ImportJob) else export_checkpoint(job)
    except (ValueError, OSError) as error:
        return str(error)
    return "done"


def assert_refused(pool: RankPool, jobs: list, out: Path, words: str) -> None:
    said = pool.call(convert, jobs)
    assert said[0] == said[1], "each rank says the same"
    assert words in said[0]
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*")), "nothing is left beside it"


def test_ranks_with_one_job_do_it(pool: RankPool, checkpoint: Path, imported: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000)
    assert pool.call(convert, [job] * WORLD) == ["done"] * WORLD
    assert contents(tmp_path / "out") == contents(imported)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "fp32"}, {"iteration": 3}, {"unit_bytes": 50_000}, {"out": "elsewhere"}],
    ids=lambda change: next(iter(change)),
)
def test_another_argument_on_one_rank(pool: RankPool, checkpoint: Path, tmp_path: Path, change: dict) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000)
    if "out" in change:
        change = {"out": str(tmp_path / "elsewhere")}
    name = next(iter(change))
    assert_refused(pool, [job, job._replace(**change)], tmp_path / "out", f"{name}: rank 0 has ")
    assert not (tmp_path / "elsewhere").exists()


def test_another_folder_of_the_same_shapes(pool: RankPool, checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].mul_(2))
    jobs = [ImportJob(str(source), str(tmp_path / "out")) for source in (checkpoint, copy)]
    assert_refused(pool, jobs, tmp_path / "out", "source: rank 0 has ")


def test_a_folder_that_rank_one_sees_otherwise(pool: RankPool, checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    """One path, other files below it: as on a host that mounts another disk there."""
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].mul_(2))
    job = ImportJob("mounted", str(tmp_path / "out"))
    said = pool.call(_import_where_mounted, job, [str(checkpoint.parent), str(copy.parent)], checkpoint.name, copy.name)
    assert said[0] == said[1]
    assert "source_versions: rank 0 has " in said[0] or "source: rank 0 has " in said[0]
    assert not (tmp_path / "out").exists()


def _import_where_mounted(job: ImportJob, parents: list[str], *names: str) -> str:
    rank = distributed.get_rank()
    return convert([job._replace(source=str(Path(parents[rank], names[rank])))] * WORLD)


def test_an_older_tracker_on_one_rank(pool: RankPool, imported: Path, tmp_path: Path) -> None:
    jobs = []
    for rank, iteration in enumerate((2, 1)):
        folder = Path(shutil.copytree(imported, tmp_path / f"rank{rank}"))
        shutil.copytree(folder / "iter_0000001", folder / "iter_0000002")
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        jobs.append(ExportJob(str(folder), str(tmp_path / "out"), scales="fresh"))
    assert_refused(pool, jobs, tmp_path / "out", "megatron: rank 0 has ")


def test_an_error_of_rank_one_alone_is_every_ranks(
    pool: RankPool, checkpoint: Path, copy: Path, tmp_path: Path
) -> None:
    file = max(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    jobs = [ImportJob(str(source), str(tmp_path / "out")) for source in (checkpoint, copy)]
    said = pool.call(convert, jobs)
    assert said[0] == said[1]
    assert file.name in said[0]
    assert not (tmp_path / "out").exists()


def _live(folder: str, other: str, out: str) -> list[str]:
    """Loading, exporting and saving with another source, or other arguments, on rank 1; what is said of each."""
    from bridge import MiniMaxM2Bridge, model_parallel

    rank, said = distributed.get_rank(), []

    def attempt(act) -> None:
        try:
            act()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("done")

    with (
        model_parallel(),
        MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge,
        MiniMaxM2Bridge.from_hf_pretrained(other if rank else folder) as mixed,
    ):
        model = bridge.to_megatron_model(params_dtype=torch.bfloat16)
        attempt(lambda: mixed.load_hf_weights(model))
        attempt(lambda: list(mixed.export_hf_weights(model)))
        attempt(lambda: mixed.save_hf_pretrained(model, out))
        attempt(lambda: list(bridge.export_hf_weights(model, "fp8" if rank else "bf16")))
        attempt(lambda: list(bridge.export_hf_weights(model, to=rank)))
        attempt(lambda: bridge.save_hf_pretrained(model, out + str(rank)))
        attempt(lambda: bridge.save_hf_pretrained(model, out, quantization=None if rank else "fp8"))
    return said


def test_live_load_export_and_save(pool: RankPool, checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors[W2 + "_scale_inv"].mul_(2))
    said = pool.call(_live, str(checkpoint), str(copy), str(tmp_path / "out"))
    assert said[0] == said[1]
    names = ["source", "source", "source", "dtype", "to", "out", "quantization"]
    for name, text in zip(names, said[0], strict=True):
        assert text.startswith(f"{name}: rank 0 has "), text
    assert sorted(os.listdir(tmp_path)) == ["copy"]
