"""Collecting tensors that ranks hold in pieces: one message a round between any two ranks, however many pieces.

A round is a list of tensors and where each is wanted: on one rank, or on all. A piece that several ranks hold is sent
by one of them, by the one that wants it if that is among them, and else by each in turn. All pieces from one rank to
another lie in one flat buffer of bytes, which goes by point-to-point; what all ranks want is broadcast by each rank
that has some of it. A rank that neither has nor wants a piece takes no part in moving it.
"""

import math
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from bridge.live_layout import LiveModel
from bridge.live_plan import Holder, Plan, Source

ROUND_BYTES = 128 << 20
_ALIGNMENT = 16


class Wanted(NamedTuple):
    """A tensor, the dtype in which it is collected, and the rank that wants it (None: all do)."""

    source: Source
    dtype: torch.dtype
    rank: int | None


class _Parcel(NamedTuple):
    """A piece of a tensor of the round, and its bytes in the message."""

    index: int
    holder: Holder
    start: int
    stop: int


def rounds(wanted: list[Wanted], limit: int = ROUND_BYTES) -> list[list[Wanted]]:
    """Tensors in rounds of at most `limit` bytes (or one tensor) for each rank; each rank's own come in order.

    Ranks' lists go side by side, so that all of them have work in each round.
    """
    lists: dict[int | None, list[list[Wanted]]] = {}
    filled: dict[int | None, int] = {}
    for one in wanted:
        nbytes = math.prod(one.source.shape) * one.dtype.itemsize
        if filled.get(one.rank, limit) + nbytes > limit:
            lists.setdefault(one.rank, []).append([])
            filled[one.rank] = 0
        lists[one.rank][-1].append(one)
        filled[one.rank] += nbytes
    return [[one for part in parts for one in part] for parts in zip_longest(*lists.values(), fillvalue=())]


@torch.no_grad()
def collect(wanted: list[Wanted], live: LiveModel, plan: Plan) -> list[tuple[Source, Tensor]]:
    """One round; gives what this rank wants, in order. All ranks must call it with the same list.

    A tensor that this rank holds whole in the right dtype comes as a view of its parameter.
    """
    exchange = _Exchange(live, plan)
    messages = exchange.messages(wanted)
    moving = {lane: parcels for lane, parcels in messages.items() if exchange.moves(lane)}
    buffers = {lane: exchange.buffer(lane, parcels, wanted) for lane, parcels in moving.items()}
    _move(buffers, live.rank)
    pieces: dict[int, list[tuple[Holder, Tensor]]] = {}
    for lane, parcels in messages.items():
        if lane[1] in (None, live.rank):
            for parcel in parcels:
                piece = exchange.received(parcel, wanted[parcel.index], lane, buffers.get(lane))
                pieces.setdefault(parcel.index, []).append((parcel.holder, piece))
    return [(wanted[index].source, _assembled(wanted[index], pieces[index])) for index in sorted(pieces)]


Lane = tuple[int, int | None]  # from, to


class _Exchange:
    """This rank's side of a round."""

    def __init__(self, live: LiveModel, plan: Plan):
        self._live, self._plan = live, plan

    def moves(self, lane: Lane) -> bool:
        return lane[0] != lane[1] and distributed.get_world_size() > 1

    def messages(self, wanted: list[Wanted]) -> dict[Lane, list[_Parcel]]:
        """What each message has in it that this rank sends or receives."""
        found: dict[Lane, list[_Parcel]] = {}
        for index, (source, dtype, to) in enumerate(wanted):
            for holder in self._plan.holders(source):
                sender = to if to in holder.ranks else holder.ranks[index % len(holder.ranks)]
                if to is None or self._live.rank in (sender, to):
                    parcels = found.setdefault((sender, to), [])
                    start = -(-parcels[-1].stop // _ALIGNMENT) * _ALIGNMENT if parcels else 0
                    parcels.append(_Parcel(index, holder, start, start + math.prod(_shape(holder)) * dtype.itemsize))
        return found

    def buffer(self, lane: Lane, parcels: list[_Parcel], wanted: list[Wanted]) -> Tensor:
        buffer = torch.empty(parcels[-1].stop, dtype=torch.uint8, device=self._live.device)
        if lane[0] == self._live.rank:
            for parcel in parcels:
                one = wanted[parcel.index]
                _view(buffer, parcel, one.dtype).copy_(self._held(one.source, parcel.holder))
        return buffer

    def received(self, parcel: _Parcel, one: Wanted, lane: Lane, buffer: Tensor | None) -> Tensor:
        if lane[0] == self._live.rank:
            return self._held(one.source, parcel.holder)
        assert buffer is not None
        return _view(buffer, parcel, one.dtype)

    def _held(self, source: Source, holder: Holder) -> Tensor:
        value = self._live.state[self._plan.parameter(source)].detach()
        return value[holder.start : holder.start + holder.rows[1] - holder.rows[0]]


def _move(buffers: dict[Lane, Tensor], me: int) -> None:
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


def _assembled(one: Wanted, pieces: list[tuple[Holder, Tensor]]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0][1].to(one.dtype)
    whole = torch.empty(one.source.shape, dtype=one.dtype, device=pieces[0][1].device)
    for holder, piece in pieces:
        place = whole[slice(*holder.rows)]
        (place if holder.cols is None else place[:, slice(*holder.cols)]).copy_(piece)
    return whole


def _view(buffer: Tensor, parcel: _Parcel, dtype: torch.dtype) -> Tensor:
    return buffer[parcel.start : parcel.stop].view(dtype).view(_shape(parcel.holder))


def _shape(holder: Holder) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in filter(None, (holder.rows, holder.cols)))
