"""The oracle: small, randomly initialised `transformers` MiniMaxM2ForCausalLM models, and their weights as on disk.

`CASES` names the models. `disk_weights` draws the weights, under on-disk names and in the checkpoint's dtypes;
`hf_model` builds the same model in `transformers`; `to_disk_names` and `to_memory_names` are a hand-written map between
the two, which owes nothing to `reference.names`.

Versions: `transformers` reads the released files' `rotary_dim` from 5.18 on; 5.0 to 5.17 ignored it and rotated every
channel, so they are no oracle for this model (`hf_model` asserts the width).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM
from transformers.models.minimax_m2 import modeling_minimax_m2 as hf

from reference.config import ModelConfig

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small model. Field names are those of the released config.json, shortened."""

    heads: int
    groups: int
    head_dim: int
    rotary: int
    hidden: int
    width: int
    experts: int
    top_k: int
    layers: int = 2
    vocab: int = 67

    def released_config(self) -> dict:
        """What a released config.json of this size says: `rotary_dim` and `rope_theta` at top level."""
        return {
            "model_type": "minimax_m2",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary,
            "rope_theta": 5_000_000,
            "intermediate_size": self.width,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.released_config())

    def hf_config(self) -> MiniMaxM2Config:
        rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": self.rotary / self.head_dim}
        return MiniMaxM2Config(**self.released_config(), rope_parameters=rope)  # older 5.x read only the latter


# Between them: 1:1, 2:1, 6:1 and all heads in one group; odd head counts; a quarter, half and all of the channels
# rotated; both head sizes; hidden sizes and expert widths on and off multiples of 128, and odd; every top-k to 8.
CASES = {
    "1to1_quarter_hd64_top1": Case(heads=4, groups=4, head_dim=64, rotary=16, hidden=96, width=72, experts=8, top_k=1),
    "6to1_half_hd128_top8": Case(
        heads=12, groups=2, head_dim=128, rotary=64, hidden=192, width=80, experts=16, top_k=8
    ),
    "one_group_full_hd128_top2": Case(
        heads=4, groups=1, head_dim=128, rotary=128, hidden=136, width=96, experts=8, top_k=2
    ),
    "1to1_odd_quarter_hd128_top4": Case(
        heads=3, groups=3, head_dim=128, rotary=32, hidden=72, width=200, experts=12, top_k=4
    ),
    "one_group_full_hd64_top3": Case(
        heads=5, groups=1, head_dim=64, rotary=64, hidden=130, width=33, experts=6, top_k=3
    ),
    "6to1_half_hd64_top6_3layers": Case(
        heads=6, groups=1, head_dim=64, rotary=32, hidden=100, width=130, experts=14, top_k=6, layers=3
    ),
    "6to1_quarter_hd64_top5_aligned": Case(
        heads=12, groups=2, head_dim=64, rotary=16, hidden=256, width=128, experts=10, top_k=5
    ),
    "2to1_half_hd128_top7": Case(heads=4, groups=2, head_dim=128, rotary=64, hidden=64, width=48, experts=16, top_k=7),
    "6to1_full_hd128_top1": Case(heads=6, groups=1, head_dim=128, rotary=128, hidden=160, width=56, experts=5, top_k=1),
}


# ------------------------------------------------------------------------------------------------- weights and names


def disk_weights(case: Case, *, dtype: torch.dtype = FLOAT32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under on-disk names: `dtype`, but router weight and bias float32 as in the checkpoint.

    With bfloat16 the router's float32 values are bfloat16-representable, because `transformers` holds the whole model
    in one dtype: both sides then start from the same numbers. The bias is wide enough to change the choice of experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=FLOAT64) * std + mean
        return values.to(dtype)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> Tensor:
        return normal(rows, cols, std=gain / math.sqrt(cols))

    def norm(size: int) -> Tensor:
        return normal(size, std=0.3, mean=1.0)

    def router(values: Tensor) -> Tensor:
        return values.to(torch.promote_types(dtype, FLOAT32))

    queries, keys = case.heads * case.head_dim, case.groups * case.head_dim
    weights = {"model.embed_tokens.weight": normal(case.vocab, case.hidden, std=1.0)}
    for i in range(case.layers):
        attention, moe = f"model.layers.{i}.self_attn.", f"model.layers.{i}.block_sparse_moe."
        weights[f"model.layers.{i}.input_layernorm.weight"] = norm(case.hidden)
        weights[attention + "q_proj.weight"] = matrix(queries, case.hidden)
        weights[attention + "k_proj.weight"] = matrix(keys, case.hidden)
        weights[attention + "v_proj.weight"] = matrix(keys, case.hidden)
        weights[attention + "o_proj.weight"] = matrix(case.hidden, queries)
        weights[attention + "q_norm.weight"] = norm(queries)
        weights[attention + "k_norm.weight"] = norm(keys)
        weights[f"model.layers.{i}.post_attention_layernorm.weight"] = norm(case.hidden)
        weights[moe + "gate.weight"] = router(matrix(case.experts, case.hidden))
        weights[moe + "e_score_correction_bias"] = router(normal(case.experts, std=0.2))
        for e in range(case.experts):
            weights[f"{moe}experts.{e}.w1.weight"] = matrix(case.width, case.hidden, gain=2.0)
            weights[f"{moe}experts.{e}.w2.weight"] = matrix(case.hidden, case.width, gain=2.0)
            weights[f"{moe}experts.{e}.w3.weight"] = matrix(case.width, case.hidden)
    weights["model.norm.weight"] = norm(case.hidden)
    weights["lm_head.weight"] = matrix(case.vocab, case.hidden)
    return weights


def to_disk_names(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """`transformers`' in-memory names to on-disk names: experts unstacked, gate_up_proj cut into w1 over w3."""
    disk = {}
    for name, tensor in memory.items():
        stem, _, last = name.rpartition("mlp.experts.")
        expert = stem + "block_sparse_moe.experts.{}.{}.weight"
        if last == "gate_up_proj":
            for e, (w1, w3) in enumerate(stacked.chunk(2) for stacked in tensor):
                disk[expert.format(e, "w1")], disk[expert.format(e, "w3")] = w1, w3
        elif stem and last == "down_proj":
            disk |= {expert.format(e, "w2"): w2 for e, w2 in enumerate(tensor)}
        else:
            disk[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
    return disk


def to_memory_names(disk: dict[str, Tensor]) -> dict[str, Tensor]:
    """On-disk names to `transformers`' in-memory names: experts stacked, w1 over w3 in gate_up_proj."""
    memory = {}
    for name, tensor in disk.items():
        stem, _, last = name.rpartition("block_sparse_moe.experts.")
        if not stem:
            memory[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
        elif last == "0.w1.weight":
            experts = [f"{stem}block_sparse_moe.experts.{e}." for e in range(_count_experts(disk, stem))]
            gate_up = [torch.cat([disk[e + "w1.weight"], disk[e + "w3.weight"]]) for e in experts]
            memory[stem + "mlp.experts.gate_up_proj"] = torch.stack(gate_up)
            memory[stem + "mlp.experts.down_proj"] = torch.stack([disk[e + "w2.weight"] for e in experts])
    return memory


def _count_experts(disk: dict[str, Tensor], stem: str) -> int:
    return sum(name.startswith(stem) and name.endswith(".w1.weight") for name in disk)


# ------------------------------------------------------------------------------------------------------- transformers


def hf_model(case: Case, weights: dict[str, Tensor], dtype: torch.dtype) -> MiniMaxM2ForCausalLM:
    """The model in `transformers`, every parameter in `dtype`, attention and experts as plain loops ("eager").

    Built in `dtype` rather than cast to it: `.to(bfloat16)` would also round RoPE's float32 frequencies.
    """
    model = MiniMaxM2ForCausalLM._from_config(
        case.hf_config(), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    model.load_state_dict(to_memory_names(weights), strict=True)
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    assert model.model.rotary_emb.inv_freq.dtype == FLOAT32
    assert model.model.rotary_emb.inv_freq.shape == (case.rotary // 2,)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    return model


class Outcome(NamedTuple):
    """One run: logits, the gradient of every parameter under on-disk names, the chosen experts of each layer."""

    logits: Tensor
    grads: dict[str, Tensor]
    experts: list[Tensor]


def run_hf(model: MiniMaxM2ForCausalLM, tokens: Tensor, cotangent: Tensor) -> Outcome:
    """Logits and d(sum of logits x cotangent)/d(parameter) by `transformers`; zeros where there is no gradient."""
    model.zero_grad()
    out = model(tokens, output_router_logits=True)
    out.logits.backward(cotangent.to(out.logits.dtype))
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    experts = [
        chosen_experts(logits, layer.mlp.e_score_correction_bias, model.num_experts_per_tok)
        for logits, layer in zip(out.router_logits, model.model.layers, strict=True)
    ]
    return Outcome(out.logits.detach(), to_disk_names(grads), experts)


def chosen_experts(logits: Tensor, bias: Tensor | float, top_k: int) -> Tensor:
    """The experts of each token as a sorted list; float32 at least."""
    wide = torch.promote_types(logits.dtype, FLOAT32)
    return (logits.detach().to(wide).sigmoid() + bias).topk(top_k, -1).indices.sort(-1).values


def settled_tokens(
    model: MiniMaxM2ForCausalLM, *, batch: int = 8, seq: int = 9, candidates: int = 256, seed: int = 0
) -> Tensor:
    """Of many random sequences, those in which every token's choice of experts is furthest from a tie.

    The choice is a step: where two experts almost tie, rounding flips it, and outputs of different models are compared.
    The distance from a tie is that of the k-th and (k+1)-th of score + bias, over all tokens and layers of a sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (candidates, seq), generator=generator)
    with torch.no_grad():
        router_logits = model(tokens, output_router_logits=True).router_logits
    gaps = []
    for logits, layer in zip(router_logits, model.model.layers, strict=True):
        ranked = (logits.sigmoid() + layer.mlp.e_score_correction_bias).sort(-1, descending=True).values
        k = model.num_experts_per_tok
        gaps.append((ranked[:, k - 1] - ranked[:, k]).view(candidates, seq).amin(-1))
    return tokens[torch.stack(gaps).amin(0).topk(batch).indices]


def remove_float32_casts(monkeypatch) -> None:
    """Let `transformers` compute in float64 where it casts to float32 whatever it is given.

    Four places are replaced, each with the same formula in the input's precision (float32 at least, so that nothing
    changes for narrower models): MiniMaxM2RMSNorm.forward, MiniMaxM2TopKRouter.forward,
    MiniMaxM2RotaryEmbedding.forward and the softmax of eager_attention_forward.
    """

    def wider(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, FLOAT32)

    def norm_forward(self, hidden_states):
        wide = hidden_states.to(wider(hidden_states.dtype))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

    def router_forward(self, hidden_states, e_score_correction_bias):
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.to(wider(logits.dtype)).sigmoid()
        index = torch.topk(scores + e_score_correction_bias, self.top_k, dim=-1, sorted=False).indices
        chosen = scores.gather(1, index)
        return logits, chosen / chosen.sum(dim=-1, keepdim=True), index

    def rotary_forward(self, x, position_ids):
        dtype, dim = wider(x.dtype), 2 * len(self.inv_freq)
        steps = torch.arange(0, dim, 2, dtype=dtype) / dim
        angles = position_ids[..., None].to(dtype) * self.config.rope_parameters["rope_theta"] ** -steps
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key, value = (hf.repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = scores.to(wider(query.dtype)).softmax(-1).to(query.dtype)
        return (probs @ value).transpose(1, 2).contiguous(), probs

    monkeypatch.setattr(hf.MiniMaxM2RMSNorm, "forward", norm_forward)
    monkeypatch.setattr(hf.MiniMaxM2TopKRouter, "forward", router_forward)
    monkeypatch.setattr(hf.MiniMaxM2RotaryEmbedding, "forward", rotary_forward)
    monkeypatch.setattr(hf, "eager_attention_forward", attention_forward)
