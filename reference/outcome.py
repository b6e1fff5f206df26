"""What a model makes of some tokens: logits, loss, and the gradient of every weight.

The reference's are `reference.lawful_model.outcome`; those of any other implementation are compared with them by
`reference.diagnosis`.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """One forward and backward pass.

    Args:
        logits: of every token.
        loss: mean cross entropy over all labels, in nats.
        gradients: d loss / d weight for each trained weight, whole, by its name in a Hugging Face checkpoint
            (`model.layers.0.self_attn.q_norm.weight`).
    """

    logits: Float[Tensor, "batch seq vocab"]
    loss: Float[Tensor, ""]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All of it as one dictionary: `logits`, `loss`, and each gradient as `gradient of <weight>`."""
        gradients = {f"{GRADIENT}{name}": value for name, value in self.gradients.items()}
        return {"logits": self.logits, "loss": self.loss, **gradients}


GRADIENT = "gradient of "
