"""What the parts of a model give under any `Laws`, each as named tensors for `reference.diagnosis.explain`.

Outputs have the names of what they are; the gradient of a sum of outputs x given cotangents is "gradient of ...".
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reference.attention import Heads, attention_block
from reference.config import ModelConfig
from reference.lawful_parts import lawful_parts, norm_heads, route_tokens
from reference.lawful_weights import read, reduced, stored
from reference.laws import MINIMAX_M2, Laws
from reference.outcome import GRADIENT


def norm_outcome(
    heads: Heads,
    weights: dict[str, Tensor],
    cotangents: Heads,
    config: ModelConfig,
    *,
    laws: Laws = MINIMAX_M2,
    tensor_parallel: int = 1,
) -> dict[str, Tensor]:
    """The norms of queries and keys: `query`, `key`, and the gradients of both and of `q_norm.weight`, `k_norm.weight`.

    With more ranks than key/value heads the normed `key`, and its cotangent, have one head for each rank.
    """
    leaves = _leaves({"query": heads.query, "key": heads.key, **weights})
    found = norm_heads(
        Heads(leaves["query"], leaves["key"]), leaves, eps=config.rms_norm_eps, laws=laws, ranks=tensor_parallel
    )
    gradients = _gradients(leaves, (found.query, found.key), (cotangents.query, cotangents.key))
    gradients = reduced(gradients, config, laws, tensor_parallel=tensor_parallel)
    return {"query": found.query.detach(), "key": found.key.detach(), **gradients}


def router_outcome(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, " experts"],
    cotangent: Float[Tensor, "tokens experts"],
    *,
    top_k: int,
    laws: Laws = MINIMAX_M2,
    tensor_parallel: int = 1,
) -> dict[str, Tensor]:
    """The router: each token's `weights` for all experts, 0 if not chosen; gradients of `hidden` and `gate.weight`."""
    leaves = _leaves({"hidden": hidden, "gate.weight": weight})
    routing = route_tokens(leaves["hidden"], leaves["gate.weight"], bias, top_k=top_k, laws=laws, ranks=tensor_parallel)
    dense = torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights)
    return {"weights": dense.detach(), **_gradients(leaves, (dense,), (cotangent,))}


def attention_outcome(
    hidden: Float[Tensor, "seq batch hidden"],
    weights: dict[str, Tensor],
    cotangent: Float[Tensor, "seq batch hidden"],
    config: ModelConfig,
    *,
    laws: Laws = MINIMAX_M2,
    tensor_parallel: int = 1,
) -> dict[str, Tensor]:
    """An attention block: its `output`, and the gradients of `hidden` and of `self_attn.q_proj.weight` and the others.

    `weights` are named as in `reference.model.layer_weights`; what is not attention's is left alone.
    """
    weights = {name: value for name, value in weights.items() if name.startswith(_ATTENTION)}
    held = stored(weights, config, laws, expert_tensor_parallel=1)
    leaves = _leaves({"hidden": hidden, **held})
    used = read({name: leaves[name] for name in held}, config, laws, tensor_parallel=tensor_parallel)
    parts = lawful_parts(laws, config, tensor_parallel=tensor_parallel).attention
    below = {name.removeprefix(_ATTENTION): value for name, value in used.items()}
    output = attention_block(leaves["hidden"], below, config, parts=parts)
    gradients = reduced(_gradients(leaves, (output,), (cotangent,)), config, laws, tensor_parallel=tensor_parallel)
    return {"output": output.detach(), **gradients}


_ATTENTION = "self_attn."


def _leaves(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _gradients(
    leaves: dict[str, Tensor], outputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return {f"{GRADIENT}{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
