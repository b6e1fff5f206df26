"""megatron-core's own `dist_checkpointing` on real ranks: it loads what we import, at any layout; what it saves at one
layout it loads at another, norms included, and we export it back to the source's bytes, and turn it into a checkpoint
of the other class. All of it for `GPTModel` and for `HybridModel`.

On four gloo ranks; each compares every parameter with `reference.sharding.shard` of the dequantised source and reports
what differs.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, all_tensors
from support.ranks import RankPool
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from bridge.torch_dist.writer import COMMON_STATE, extra_state_keys
from reference.config import ModelConfig
from reference.fp8 import dequantize_blockwise
from reference.model_class import ModelClass
from reference.parallelism import Parallelism, padded_vocab_size
from reference.sharding import parameters, shard
from reference.weights import CHECKPOINT_DIALECTS, Dialect

WORLD = 4
DIST_CONFIG = EDGY_CONFIG | {"num_attention_heads": 8, "num_local_experts": 4}  # 2 key heads, 131 tokens, 72 wide
CONFIG = ModelConfig.from_hf(DIST_CONFIG)
LAYOUTS = {
    "one rank": Parallelism(dp=4),
    "pp2": Parallelism(pp=2, dp=2, vocab_divisor=64),
    "tp2 ep2": Parallelism(tp=2, ep=2, etp=1, dp=2, vocab_divisor=8),
    "tp2 etp2 pp2": Parallelism(tp=2, etp=2, pp=2),
    "tp4, 2 key heads": Parallelism(tp=4, etp=4, vocab_divisor=16),
}
GPT, HYBRID = ModelClass
STACKED, BY_LAYER, OF_HYBRID = Dialect.TORCH_DIST, Dialect.TORCH_DIST_LAYERS, Dialect.TORCH_DIST_HYBRID
NAMES = {GPT: Dialect.MEGATRON_LOCAL, HYBRID: Dialect.HYBRID_LOCAL}
BUILD = {GPT: "build_gpt_model", HYBRID: "build_hybrid_model"}
# Saved at one layout under the keys of a dialect, loaded at others.
SAVED = {
    ("tp2 ep2", STACKED): ["pp2"],
    ("pp2", STACKED): ["tp2 ep2"],
    ("tp4, 2 key heads", STACKED): ["pp2", "one rank"],
}
SAVED |= {("one rank", STACKED): ["tp4, 2 key heads"], ("tp2 etp2 pp2", BY_LAYER): []}
SAVED |= {("tp2 ep2", OF_HYBRID): ["pp2"], ("pp2", OF_HYBRID): ["tp4, 2 key heads"], ("tp2 etp2 pp2", OF_HYBRID): []}
# What Transformer Engine has an extra state for and the local spec has not.
ONLY_IN_TRANSFORMER_ENGINE = tuple(
    f"{name}._extra_state" for name in ("pre_mlp_layernorm", "final_layernorm", "final_norm")
)


def dequantised(folder: Path) -> dict[str, Tensor]:
    """By the reference, from what safetensors reads."""
    tensors = all_tensors(folder)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    found = {}
    for name, value in tensors.items():
        scale_inv = scales.get(f"{name}_scale_inv")
        found[name] = value if scale_inv is None else dequantize_blockwise(value, scale_inv, dtype=torch.bfloat16)
    return found


# ------------------------------------------------------------------------------------------------------------- one rank


def load_imported(name: str, kind: ModelClass, folder: Path) -> dict[str, Any]:
    """What is wrong after loading at a layout, and the keys; the model is saved where SAVED asks for it."""
    with in_layout(LAYOUTS[name]):
        model = LoadedModel(torch.distributed.get_rank(), LAYOUTS[name], kind, imported_as(folder, kind))
        report = {"wrong": model.wrong(torch.load(folder / "tensors.pt")), "keys": model.keys}
        for dialect in CHECKPOINT_DIALECTS[kind]:
            if (name, dialect) in SAVED:
                report["shapes"] = model.save(saved_at(folder, (name, dialect)), dialect)
    return report


def load_from(path: Path, name: str, kind: ModelClass, folder: Path) -> list[str]:
    """What is wrong after loading a checkpoint at a layout."""
    with in_layout(LAYOUTS[name]):
        model = LoadedModel(torch.distributed.get_rank(), LAYOUTS[name], kind, path)
        return model.wrong(torch.load(folder / "tensors.pt"))


def saved_at(folder: Path, saved: tuple[str, Dialect]) -> Path:
    return folder / f"{saved[0]} {saved[1]}"


def imported_as(folder: Path, kind: ModelClass) -> Path:
    return folder / f"imported {kind}/iter_0000001"


def class_of(dialect: Dialect) -> ModelClass:
    return next(kind for kind, dialects in CHECKPOINT_DIALECTS.items() if dialect in dialects)


def in_layout(layout: Parallelism) -> Any:
    from bridge.model.process_groups import model_parallel

    return model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )


class LoadedModel:
    """This rank's part of a model, filled with NaN and then from a checkpoint by megatron-core."""

    def __init__(self, rank: int, layout: Parallelism, kind: ModelClass, path: Path):
        from megatron.core import dist_checkpointing, parallel_state

        from bridge.model import build
        from bridge.weights.param_mapping import model_state

        self.model = getattr(build, BUILD[kind])(
            CONFIG,
            backend="local",
            vocab_size=padded_vocab_size(CONFIG, layout),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            sequence_parallel=layout.tp > 1,
            perform_initialization=False,
        )
        self.held = parameters(CONFIG, layout, rank, NAMES[kind])
        self.state = model_state(self.model)
        with torch.no_grad():
            for value in self.state.values():
                value.fill_(torch.nan)
        sharded = self.model.sharded_state_dict()
        own = set(sharded)
        self.keys = sorted({getattr(value, "unique_key", value.key) for value in sharded.values()})
        loaded = dist_checkpointing.load(sharded, str(path))
        self.model.load_state_dict({name: value for name, value in loaded.items() if name in own})

    def wrong(self, tensors: dict[str, Tensor]) -> list[str]:
        """Parameters that are not bit for bit what the reference cuts for this rank."""
        if self.state.keys() != {parameter.name for parameter in self.held}:
            return ["the model's parameters are not the reference's"]
        wrong = []
        for parameter in self.held:
            value, wanted = self.state[parameter.name], shard(parameter, tensors)
            if not torch.equal(value, wanted.to(value)):
                wrong.append(parameter.name)
        return wrong

    def save(self, path: Path, dialect: Dialect) -> dict[str, list[int]]:
        """Saves, and says the whole shape that each key of this rank's part has."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        if torch.distributed.get_rank() == 0:
            path.mkdir()
        torch.distributed.barrier()
        metadata = {"non_homogeneous_layers": True} if dialect is BY_LAYER else None
        sharded = self.model.sharded_state_dict(metadata=metadata)
        shapes = {v.key: list(v.global_shape) for v in sharded.values() if isinstance(v, ShardedTensor)}
        dist_checkpointing.save(sharded, str(path))
        return shapes


# ------------------------------------------------------------------------------------------------------------ judgement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and what we import of it; the ranks save beside them."""
    folder = tmp_path_factory.mktemp("ranks")
    make_checkpoint(folder / "source", DIST_CONFIG, mtp_layers=1, max_shard_bytes=150_000)
    for kind in ModelClass:
        out = imported_as(folder, kind).parent
        import_checkpoint(ImportJob(str(folder / "source"), str(out), unit_bytes=200_000, model=kind))
    torch.save(dequantised(folder / "source"), folder / "tensors.pt")
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


Reports = Callable[[str, ModelClass], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(ranks: RankPool, folder: Path) -> Reports:
    """What every rank reports of a layout, which loads, and saves, when it is first asked for."""
    return cache(lambda layout, kind: ranks.call(load_imported, layout, kind, folder))


@pytest.mark.parametrize("kind", ModelClass)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_what_we_import(reports: Reports, layout: str, kind: ModelClass) -> None:
    assert [report["wrong"] for report in reports(layout, kind)] == [[]] * WORLD


@pytest.mark.parametrize(
    ("saved", "layout"), [(saved, name) for saved, names in SAVED.items() for name in names], ids=str
)
def test_what_megatron_saves_at_one_layout_loads_at_another(
    ranks: RankPool, reports: Reports, folder: Path, saved: tuple[str, Dialect], layout: str
) -> None:
    kind = class_of(saved[1])
    reports(saved[0], kind)
    assert ranks.call(load_from, saved_at(folder, saved), layout, kind, folder) == [[]] * WORLD


@pytest.mark.parametrize(
    ("saved", "layout"),
    [(("tp2 ep2", STACKED), "tp2 etp2 pp2"), (("tp2 etp2 pp2", BY_LAYER), "pp2"), (("pp2", OF_HYBRID), "tp2 ep2")],
    ids=str,
)
def test_what_one_class_saves_loads_into_the_other(
    ranks: RankPool, reports: Reports, folder: Path, tmp_path: Path, saved: tuple[str, Dialect], layout: str
) -> None:
    """By an import of it, at another layout too; the config is that of the source, since none is beside it."""
    kind = class_of(saved[1])
    other = next(one for one in ModelClass if one is not kind)
    reports(saved[0], kind)
    job = ImportJob(str(saved_at(folder, saved)), str(tmp_path / "other"), model=other)
    with pytest.raises(ValueError, match=r"no hugging_face/config\.json is there"):
        import_checkpoint(job)
    summary = import_checkpoint(job._replace(hugging_face=str(folder / "source")))
    assert summary.other_tensors == 0
    assert ranks.call(load_from, tmp_path / "other/iter_0000001", layout, other, folder) == [[]] * WORLD


@pytest.mark.parametrize("kind", ModelClass)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_keys_are_those_that_megatron_asks_for(
    folder: Path, reports: Reports, layout: str, kind: ModelClass
) -> None:
    """And beyond those the common state, and the extra states of Transformer Engine's norms."""
    asked = {key for report in reports(layout, kind) for key in report["keys"]}
    extra = {key for key in extra_state_keys(CONFIG, kind) if any(part in key for part in ONLY_IN_TRANSFORMER_ENGINE)}
    assert len(extra) == CONFIG.num_hidden_layers + 1
    written = FileSystemReader(imported_as(folder, kind)).read_metadata().state_dict_metadata
    assert set(written) == asked | extra | {COMMON_STATE}


def test_the_norms_have_megatron_bridges_keys_and_shapes(reports: Reports) -> None:
    """Global shapes say nothing of the layout: all heads, also where 4 ranks share 2 key heads."""
    layers, query, key = CONFIG.num_hidden_layers, 8 * CONFIG.head_dim, 2 * CONFIG.head_dim
    for layout in ("tp2 ep2", "tp4, 2 key heads", "one rank", "pp2"):
        for report in reports(layout, GPT):
            shapes = report["shapes"]
            assert shapes["decoder.layers.self_attention.q_layernorm.weight"] == [layers, query]
            assert shapes["decoder.layers.self_attention.k_layernorm.weight"] == [layers, key]
    stages = [reports("tp2 etp2 pp2", GPT)[rank]["shapes"] for rank in (0, 2)]
    for layer, shapes in enumerate(stages):
        norms = {name: shape for name, shape in shapes.items() if "q_layernorm" in name or "k_layernorm" in name}
        prefix = f"decoder.layers.{layer}.self_attention"
        assert norms == {f"{prefix}.q_layernorm.weight": [query], f"{prefix}.k_layernorm.weight": [key]}


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_what_megatron_saves_is_exported_to_the_sources_bytes(
    reports: Reports, folder: Path, tmp_path: Path, saved: tuple[str, Dialect]
) -> None:
    reports(saved[0], class_of(saved[1]))
    job = ExportJob(
        str(saved_at(folder, saved)), str(tmp_path / "out"), source=str(folder / "source"), max_shard_bytes=200_000
    )
    summary = export_checkpoint(job)
    source, out = all_tensors(folder / "source"), all_tensors(tmp_path / "out")
    assert source.keys() == out.keys()
    for name, value in source.items():
        assert (value.dtype, value.shape) == (out[name].dtype, out[name].shape), name
        assert torch.equal(value.view(torch.uint8), out[name].view(torch.uint8)), name
    assert (folder / "source/config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()
    weights = sum(name.endswith("_scale_inv") for name in source)
    assert (summary.identical, summary.requantised) == (weights, 0)


@pytest.mark.parametrize("saved", [saved for saved in SAVED if saved[1] is not STACKED], ids=str)
def test_a_config_of_fewer_layers_is_refused(reports: Reports, folder: Path, saved: tuple[str, Dialect]) -> None:
    """With a key for each layer every weight that it describes is there, and more."""
    reports(saved[0], class_of(saved[1]))
    fewer = replace(CONFIG, num_hidden_layers=CONFIG.num_hidden_layers - 1)
    first = fewer.num_hidden_layers * (2 if saved[1] is OF_HYBRID else 1)
    with pytest.raises(ValueError, match=rf"decoder.layers.{first}.*no such weight"):
        MegatronCheckpoint(saved_at(folder, saved), fewer)


def test_megatron_reads_the_common_state(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_common_state_dict(str(imported_as(folder, HYBRID)))
    of_hybrid = {name: getattr(state["args"], name) for name in ("num_layers", "hybrid_layer_pattern")}
    assert of_hybrid == {"num_layers": 4, "hybrid_layer_pattern": "*E*E"}
    state = dist_checkpointing.load_common_state_dict(str(imported_as(folder, GPT)))
    assert not hasattr(state["args"], "hybrid_layer_pattern")
    arguments = state["args"]
    assert isinstance(arguments, Namespace)
    assert (state["iteration"], state["checkpoint_version"]) == (1, 3.0)
    found = {
        "num_layers": arguments.num_layers,
        "hidden_size": arguments.hidden_size,
        "num_attention_heads": arguments.num_attention_heads,
        "num_query_groups": arguments.num_query_groups,
        "kv_channels": arguments.kv_channels,
        "num_experts": arguments.num_experts,
        "moe_ffn_hidden_size": arguments.moe_ffn_hidden_size,
        "padded_vocab_size": arguments.padded_vocab_size,
        "rotary_channels": arguments.rotary_percent * arguments.kv_channels,
    }
    assert found == {
        "num_layers": 2,
        "hidden_size": 160,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 48,
        "num_experts": 4,
        "moe_ffn_hidden_size": 72,
        "padded_vocab_size": 131,
        "rotary_channels": 24,
    }


def test_one_process_loads_it_too(folder: Path) -> None:
    """A world of one, as a notebook or a test has it."""
    tensors = torch.load(folder / "tensors.pt")
    with in_layout(Parallelism()):
        model = LoadedModel(0, Parallelism(), GPT, imported_as(folder, GPT))
        assert model.wrong(tensors) == []
        name = "model.layers.1.self_attn.k_norm.weight"
        tensors[name] = tensors[name].flip(0)
        assert model.wrong(tensors) == ["decoder.layers.1.self_attention.qk_norm.k_weight"], "the comparison sees it"
