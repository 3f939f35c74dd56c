"""Prefixes of prompts that need not be computed again: copied from the slots, or from a store of what has left them.

The store holds whole blocks of positions: the target's keys and values, the draft's, and the hidden states that are
kept by position. A block belongs to a scope and to all tokens from the prompt's first one to its own last one, so that
prompts share the blocks of their common beginning. A full store forgets the block that was used least recently, and of
one prompt the last blocks first. What is copied has the bits that computing it would give.

Left out: which slots hold what, and who may use it (serve/engine/slot_allocator.py); when a prompt is looked for
(serve/engine/prefill.py).

Shapes: S slots, L capacity of a slot, C blocks of a slot of P positions, N places of the store.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch

from aurora_lit.kernels.native import KEY_BLOCK
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, copy_blocks, state_blocks, state_pool
from aurora_lit.request import Scope
from aurora_lit.serve.speculation.sources.drafter import Drafter

_P = ParamSpec("_P")


class Prefix(NamedTuple):
    """The first `length` tokens of a prompt, and where what was computed for them is."""

    length: int = 0
    """0: nowhere."""
    slot: int = 0
    places: tuple[int, ...] = ()
    """Of the store; empty: it is in `slot`."""


class _Block(NamedTuple):
    number: int
    """No other block ever has it."""
    place: int


def _in_one_thread(method: Callable[_P, None]) -> Callable[_P, None]:
    """Several threads would wait for each other at every tensor: beside a busy process 8 ms each time, 0.4 s in all."""

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            method(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


class PrefixCache:
    """Copies prefixes, and keeps those whose slots other requests take.

    >>> cache = PrefixCache(target, kv_cache, drafter=drafter, states=[features_SLF], capacity_bytes=256 << 20)
    >>> cache.keep(scope, tokens, slot=3)                       # before another request takes slot 3
    >>> places = cache.find(scope, prompt_ids)
    >>> cache.copy(Prefix(len(places) * KEY_BLOCK, places=places), slot=1, start=0)
    """

    def __init__(
        self,
        target: Target,
        kv_cache: KVCache,
        *,
        drafter: Drafter | None,
        states: Sequence[torch.Tensor],
        capacity_bytes: int,
    ) -> None:
        """`states`: hidden states [S, L, …] that are kept by slot and position. `capacity_bytes`: of the store, in this
        process; on the CPU memory is taken as it fills.
        """
        self._target, self._kv_cache, self._drafter, self._states = target, kv_cache, drafter, states
        state_bytes = sum(states_SLX[0, 0].nbytes for states_SLX in states)
        position_bytes = state_bytes + (drafter.bytes_per_position if drafter else 0)
        block_bytes = sum(blocks_SCX[0, 0].nbytes for blocks_SCX in kv_cache.blocks())
        self._block_bytes = block_bytes + KEY_BLOCK * position_bytes
        num_places = capacity_bytes // self._block_bytes
        self._pool = target.make_kv_cache(num_slots=num_places, capacity=KEY_BLOCK, is_pool=True)
        self._kept_states = [state_pool(states_SLX, num_places) for states_SLX in states]
        if drafter:
            drafter.make_pool(num_places)
        self._free = list(range(num_places))
        self._blocks: OrderedDict[tuple[Scope | int, bytes], _Block] = OrderedDict()
        """By the number of the block before, or the scope of a first one, and their own tokens; least recently used
        first, and every block before the one that it follows."""
        self._numbers = itertools.count()

    @property
    def num_bytes(self) -> int:
        """Size of all that the store holds."""
        return len(self._blocks) * self._block_bytes

    def find(self, scope: Scope, tokens: Sequence[int]) -> tuple[int, ...]:
        """Where the store has the first blocks of a prompt, as many as it has."""
        return tuple(block.place for block in self._find(scope, _split(tokens)))

    @_in_one_thread
    def keep(self, scope: Scope, tokens: Sequence[int], *, slot: int) -> None:
        """Keep the whole blocks of what a slot holds, as many as there is room for; `tokens`: all that it holds."""
        own = _split(tokens)
        chain = self._find(scope, own)
        self._make_room(len(own) - len(chain), but=chain)
        new, self._free = self._free[: len(own) - len(chain)], self._free[len(own) - len(chain) :]
        if new:
            self._copy_blocks(slot, len(chain), new, to_pool=True)
        if self._drafter:
            self._drafter.keep_blocks(slot, [*(block.place for block in chain), *new], first=len(chain))
        # A block is found only from here on, when it has been copied.
        for tokens_of_block, place in zip(own[len(chain) :], new, strict=False):
            block = _Block(next(self._numbers), place)
            self._blocks[chain[-1].number if chain else scope, tokens_of_block] = block
            chain.append(block)
        self._find(scope, own)

    @_in_one_thread
    def copy(self, prefix: Prefix, *, slot: int, start: int) -> None:
        """Copy a prefix to a slot, which has its first `start` positions already."""
        if prefix.places:
            first = start // KEY_BLOCK
            self._copy_blocks(slot, first, prefix.places[first:], to_pool=False)
        else:
            source, length = prefix.slot, prefix.length
            where = {"source": source, "slot": slot, "length": length, "start": start}
            self._target.copy_prefix(kv_cache=self._kv_cache, **where)
            for states_SLX in self._states:
                states_SLX[slot, start:length] = states_SLX[source, start:length]
        if self._drafter and prefix.places:
            self._drafter.load_blocks(slot, prefix.places)
        elif self._drafter:
            self._drafter.copy_prefix(prefix.slot, slot, prefix.length)

    def _find(self, scope: Scope, own: Sequence[bytes]) -> list[_Block]:
        """The first blocks of a prompt; they are now the most recently used ones."""
        keys: list[tuple[Scope | int, bytes]] = []
        chain: list[_Block] = []
        for tokens in own:
            key = (chain[-1].number if chain else scope, tokens)
            block = self._blocks.get(key)
            if block is None:
                break
            keys.append(key)
            chain.append(block)
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return chain

    def _make_room(self, num_places: int, *, but: Sequence[_Block]) -> None:
        """Forget blocks, but not these, the most recently used ones, until so many places are free or none is left."""
        while len(self._free) < num_places and len(self._blocks) > len(but):
            self._free.append(self._blocks.popitem(last=False)[1].place)

    def _copy_blocks(self, slot: int, first: int, places: Sequence[int], *, to_pool: bool) -> None:
        where: dict[str, Any] = {"slot": slot, "first": first, "places": places, "to_pool": to_pool}
        self._target.copy_blocks(kv_cache=self._kv_cache, pool=self._pool, **where)
        copy_blocks(zip(map(state_blocks, self._states), self._kept_states, strict=True), **where)


def _split(tokens: Sequence[int]) -> list[bytes]:
    """Whole blocks of tokens, as keys."""
    whole = len(tokens) // KEY_BLOCK * KEY_BLOCK
    return [array("q", tokens[at : at + KEY_BLOCK]).tobytes() for at in range(0, whole, KEY_BLOCK)]
