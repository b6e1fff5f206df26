"""Gathering tensors that ranks hold in pieces: one message a round between any two ranks, however many pieces.

A round is a list of requests: tensors, and for each the rank that wants it, or all ranks. Of the ranks that hold the
same piece one sends it: the one that wants it where it is among them, and else each in turn. All pieces from one rank
to another are one flat buffer of bytes, sent point-to-point; what all ranks want is broadcast by each rank that has
some of it. A rank that neither has nor wants a piece takes no part in moving it.
"""

import math
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from bridge.jobs.ranks import backends
from bridge.weights.shard_map import Replicas, Source
from bridge.weights.sharded_model import ShardedModel

ROUND_BYTES = 128 << 20
_ALIGNMENT = 16


class GatherRequest(NamedTuple):
    """A tensor, the dtype in which it is gathered, and the rank that wants it (None: all do)."""

    source: Source
    dtype: torch.dtype
    rank: int | None


class _Segment(NamedTuple):
    """A piece of the tensor of request `index`; it is bytes `start:stop` of the message."""

    index: int
    replicas: Replicas
    start: int
    stop: int


def rounds(requests: list[GatherRequest], limit: int = ROUND_BYTES) -> list[list[GatherRequest]]:
    """Requests in rounds: in each, every rank gets at most `limit` bytes (or one tensor), in the order of its requests.

    The ranks' requests are served side by side, so that every rank has work in every round.
    """
    lists: dict[int | None, list[list[GatherRequest]]] = {}
    filled: dict[int | None, int] = {}
    for request in requests:
        nbytes = math.prod(request.source.shape) * request.dtype.itemsize
        if filled.get(request.rank, limit) + nbytes > limit:
            lists.setdefault(request.rank, []).append([])
            filled[request.rank] = 0
        lists[request.rank][-1].append(request)
        filled[request.rank] += nbytes
    return [[request for part in parts for request in part] for parts in zip_longest(*lists.values(), fillvalue=())]


@torch.no_grad()
def gather_tensors(requests: list[GatherRequest], sharded: ShardedModel) -> list[tuple[Source, Tensor]]:
    """One round: the tensors that this rank wants, in order. All ranks must call it with the same requests.

    A tensor that this rank holds whole in the right dtype is a view of its parameter.
    """
    exchange = _Exchange(sharded)
    messages = exchange.messages(requests)
    moving = {route: segments for route, segments in messages.items() if exchange.moves(route)}
    buffers = {route: exchange.buffer(route, segments, requests) for route, segments in moving.items()}
    _move(buffers, sharded.rank)
    pieces: dict[int, list[tuple[Replicas, Tensor]]] = {}
    for route, segments in messages.items():
        if route[1] in (None, sharded.rank):
            for segment in segments:
                piece = exchange.received(segment, requests[segment.index], route, buffers.get(route))
                pieces.setdefault(segment.index, []).append((segment.replicas, piece))
    return [(requests[index].source, _assembled(requests[index], pieces[index])) for index in sorted(pieces)]


Route = tuple[int, int | None]  # the sending rank, the receiving one (None: all)


class _Exchange:
    """What this rank sends and receives in a round."""

    def __init__(self, sharded: ShardedModel):
        self._sharded, self._shard_map = sharded, sharded.shard_map

    @cached_property
    def _message_device(self) -> torch.device:
        """gloo's send and receive take host memory only."""
        device = self._sharded.device
        return torch.device("cpu") if backends().get(device.type) == "gloo" else device

    def moves(self, route: Route) -> bool:
        """Whether anything goes from one rank to another."""
        return route[0] != route[1] and distributed.get_world_size() > 1

    def messages(self, requests: list[GatherRequest]) -> dict[Route, list[_Segment]]:
        """The segments of each message that this rank sends or receives."""
        found: dict[Route, list[_Segment]] = {}
        for index, (source, dtype, to) in enumerate(requests):
            for replicas in self._shard_map.replicas(source):
                sender = to if to in replicas.ranks else replicas.ranks[index % len(replicas.ranks)]
                if to is None or self._sharded.rank in (sender, to):
                    segments = found.setdefault((sender, to), [])
                    start = -(-segments[-1].stop // _ALIGNMENT) * _ALIGNMENT if segments else 0
                    segments.append(
                        _Segment(index, replicas, start, start + math.prod(_shape(replicas)) * dtype.itemsize)
                    )
        return found

    def buffer(self, route: Route, segments: list[_Segment], requests: list[GatherRequest]) -> Tensor:
        """A message's bytes: filled if this rank sends it, else room to receive them."""
        buffer = torch.empty(segments[-1].stop, dtype=torch.uint8, device=self._message_device)
        if route[0] == self._sharded.rank:
            for segment in segments:
                request = requests[segment.index]
                _view(buffer, segment, request.dtype).copy_(self._held(request.source, segment.replicas))
        return buffer

    def received(self, segment: _Segment, request: GatherRequest, route: Route, buffer: Tensor | None) -> Tensor:
        """A piece that this rank wants: of its own parameter, or from a message that has arrived."""
        if route[0] == self._sharded.rank:
            return self._held(request.source, segment.replicas)
        assert buffer is not None
        return _view(buffer, segment, request.dtype).to(self._sharded.device)

    def _held(self, source: Source, replicas: Replicas) -> Tensor:
        value = self._sharded.state[self._shard_map.parameter(source)].detach()
        return value[replicas.start : replicas.start + replicas.rows[1] - replicas.rows[0]]


def _move(buffers: dict[Route, Tensor], me: int) -> None:
    sends_and_receives = []
    for (sender, to), buffer in sorted(buffers.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if to is None:
            distributed.broadcast(buffer, sender)
        elif sender == me:
            sends_and_receives.append(distributed.P2POp(distributed.isend, buffer, to))
        else:
            sends_and_receives.append(distributed.P2POp(distributed.irecv, buffer, sender))
    if sends_and_receives:
        for work in distributed.batch_isend_irecv(sends_and_receives):
            work.wait()


def _assembled(request: GatherRequest, pieces: list[tuple[Replicas, Tensor]]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0][1].to(request.dtype)
    whole = torch.empty(request.source.shape, dtype=request.dtype, device=pieces[0][1].device)
    for replicas, piece in pieces:
        band = whole[slice(*replicas.rows)]
        (band if replicas.cols is None else band[:, slice(*replicas.cols)]).copy_(piece)
    return whole


def _view(buffer: Tensor, segment: _Segment, dtype: torch.dtype) -> Tensor:
    return buffer[segment.start : segment.stop].view(dtype).view(_shape(segment.replicas))


def _shape(replicas: Replicas) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in filter(None, (replicas.rows, replicas.cols)))
