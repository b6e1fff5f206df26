"""A router's products of 4096 tokens: logits, and the gradients of tokens and of the float32 weight.

    python tests/benchmarks/bench_router.py OUT.json

`compiled.router` and what torch does in float32, as `bridge.model.router` has it elsewhere. Byte model: a pass reads or
writes 4096 rows of 3072 in bfloat16, 25 MB, beside which the weight is little: three passes forward and backward. Both
are captured in CUDA graphs, as in training, and their replays timed: microseconds of a call, medians of 20 replays of
20 calls. The baseline is float32, not TensorFloat-32.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.model.router import Float32Logits
from compiled.router import router_logits

sys.path.insert(0, str(Path(__file__).parent))
from record import asked_on_a_gpu, environment, median_ms

TOKENS, HIDDEN, EXPERTS = 4096, 3072, (32, 256)
SETS, CALLS, RUNS = 4, 20, 20  # inputs in turns, more than caches hold
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "compiled.router": router_logits,
    "torch, float32": Float32Logits.apply,
}


def captured_us(call: Callable[[int], object]) -> float:
    """Of a call in a graph, on the stream of this moment: autograd goes back on that of its forward pass."""
    for number in range(SETS):
        call(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for number in range(CALLS):
            call(number % SETS)
    return 1e3 * median_ms(graph.replay, warm_up=3, runs=RUNS) / CALLS


def measured(logits: Callable[[Tensor, Tensor], Tensor], experts: int) -> dict[str, float]:
    tokens = [torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16().requires_grad_() for _ in range(SETS)]
    weight = torch.randn(experts, HIDDEN, device="cuda", requires_grad=True)
    grad = torch.randn(TOKENS, experts, device="cuda")
    forward = captured_us(lambda i: logits(tokens[i], weight))
    both = captured_us(lambda i: torch.autograd.grad(logits(tokens[i], weight), (tokens[i], weight), grad))
    return {"forward us": round(forward, 1), "backward us": round(both - forward, 1)}


def main() -> None:
    asked = asked_on_a_gpu(__doc__)
    found: dict[str, Any] = {"what": "a router's products", **environment()}
    found["config"] = {"tokens": TOKENS, "hidden": HIDDEN, "sets": SETS, "calls": CALLS, "runs": RUNS}
    with torch.cuda.stream(torch.cuda.Stream()):  # pyright: ignore[reportArgumentType]
        found["rows"] = {
            f"{experts} experts": {name: measured(logits, experts) for name, logits in IMPLEMENTATIONS.items()}
            for experts in EXPERTS
        }
    print(json.dumps(found["rows"], indent=1))
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
