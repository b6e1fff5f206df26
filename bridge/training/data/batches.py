"""Which sequences each rank trains on at each step: samples of megatron-core's `GPTDataset`, in an order of the seed.

Sample n of the run is the same at any layout: step s has samples s x global batch and the following ones, which the
data-parallel ranks share out, so that a run goes on where it stopped, on other ranks too. Documents follow one another
in sequences of `seq_length`; the files of a blend are drawn by their weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from bridge.jobs.os_errors import os_errors_of
from bridge.training.data.indexed import Source
from bridge.training.settings import TrainJob


class MaskedGPTDataset(GPTDataset):
    """megatron-core's samples of token ids, where -(id + 1) is an id that is not trained on."""

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Tokens, the label of each, and 1.0 where the label is trained on."""
        kept, _, _ = self._query_document_sample_shuffle_indices(idx or 0)
        return _sample(torch.from_numpy(kept))


# Of a sample; megatron-core adds the number of its dataset in a blend.
NAMES = ("tokens", "labels", "loss_mask")


def _sample(kept: Int64[Tensor, " length"]) -> dict[str, Tensor]:
    ids = torch.where(kept < 0, -kept - 1, kept)
    return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": (kept[1:] >= 0).float()}


class _NoTokenizer:
    """What `GPTDatasetConfig` asks of a tokenizer, for ids that are there already."""

    vocab_size = None
    unique_identifiers = {"ids": "as they are, -(id + 1) where not trained on"}  # noqa: RUF012


def build_dataset(job: TrainJob, sources: Sequence[Source], cache: Path) -> Any:
    """The samples of the whole run; all ranks must call it. Indices are kept in `cache`."""
    samples = job.steps * job.global_batch_size
    weights = job.data_weights or tuple(float(source.tokens) for source in sources)
    config = GPTDatasetConfig(
        random_seed=job.seed,
        sequence_length=job.seq_length,
        blend=([source.prefix for source in sources], None if len(sources) == 1 else list(weights)),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=_NoTokenizer(),  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(MaskedGPTDataset, [samples, 0, 0], lambda: True, config)
    with os_errors_of(cache):
        train, *_ = builder.build()
    return train


def microbatches(dataset: Any, job: TrainJob, step: int, *, dp: int, dp_rank: int) -> Iterator[dict[str, Tensor]]:
    """The microbatches of a rank at a step (the first is 1), in order."""
    each = job.micro_batch_size
    start = (step - 1) * job.global_batch_size
    for first in range(start, start + job.global_batch_size, each * dp):
        samples = [dataset[first + dp_rank * each + i] for i in range(each)]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in NAMES}
