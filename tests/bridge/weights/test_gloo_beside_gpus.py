"""Models on a GPU whose ranks have gloo alone, whose send takes host memory: what comes out has the files' bytes."""

from pathlib import Path

import pytest
from support.checkpoints import all_tensors
from support.checks import NO_GPU
from support.conversions import assert_same_tensors
from support.sharded_models import groups_of, truth_of

from bridge.jobs.rank_pool import RankPool
from reference.parallelism import Parallelism


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:gloo"])
def test_it_is_exported_and_saved(backend: str, wide_checkpoint: Path, tmp_path: Path) -> None:
    with RankPool(2, backend) as pool:
        pool.call(_export_and_save, str(wide_checkpoint), tmp_path / "out")


def _export_and_save(folder: str, out: Path) -> None:
    from bridge import MiniMaxM2Bridge

    disk = truth_of(folder).disk
    with groups_of(Parallelism(tp=2, etp=2)), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        model = bridge.to_megatron_model()
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        exported = dict(bridge.export_hf_weights(model, "source"))
        assert {value.device.type for value in exported.values()} == {"cuda"}
        ours = {name: value for name, value in disk.items() if name not in bridge.checkpoint.mtp_tensors}
        assert_same_tensors({name: value.cpu() for name, value in exported.items()}, ours)
        bridge.save_hf_pretrained(model, out)
    assert_same_tensors(all_tensors(out), disk)
