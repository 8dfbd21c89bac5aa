"""A radix tree of token sequences: every shared prefix is one node, every token is stored once.

A node is a run of tokens with a parent; a sequence is a path from the root. Nodes are numbered in
depth-first order and own consecutive tokens in it. Equal token ids at equal prefixes have equal
activations, which is what makes sharing exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Node:
    """Tokens [start, end) of the tree; `depth` is the position of the first; `parent` a node number
    or −1.
    """

    start: int
    end: int
    parent: int
    depth: int


class TokenTree:
    """The tree of `sequences` (non-empty lists of token ids, in any order, duplicates allowed).

    `ids`, `positions`: int64 [num_tokens]. `paths[i]`: int64 [len(sequence i)], the tree's tokens
    along sequence i.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        if any(len(s) == 0 for s in sequences):
            raise ValueError("a sequence is empty")
        order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
        arrays: list[Ids] = [np.asarray(sequences[i], dtype=np.int64) for i in order]
        shared = _shared_with_previous(arrays)
        self.nodes: list[Node] = []
        ends = [-1] * len(arrays)
        runs: list[Ids] = []
        num_tokens = 0
        # An entry is a range of the sorted sequences that agree before `depth` and hang below
        # `parent`; what they agree on beyond it is the least that two neighbours share.
        stack = [(lo, hi, 0, -1) for lo, hi in _split(shared, 0, len(arrays), 0)]
        while stack:
            lo, hi, depth, parent = stack.pop()
            length = int(shared[lo + 1 : hi].min()) if hi - lo > 1 else arrays[lo].size
            number = len(self.nodes)
            self.nodes.append(Node(num_tokens, num_tokens + length - depth, parent, depth))
            runs.append(arrays[lo][depth:length])
            num_tokens += length - depth
            # Sequences that end here sort before those that go on.
            while lo < hi and arrays[lo].size == length:
                ends[order[lo]] = number
                lo += 1
            stack += [(*part, length, number) for part in _split(shared, lo, hi, length)]
        self.ids: Tensor = torch.from_numpy(np.concatenate(runs) if runs else np.empty(0, np.int64))
        depths = [np.arange(n.depth, n.depth + n.end - n.start) for n in self.nodes]
        self.positions: Tensor = torch.from_numpy(
            np.concatenate(depths) if depths else np.empty(0, np.int64)
        )
        self.paths: list[Tensor] = [self.path_of_node(number) for number in ends]

    @property
    def num_tokens(self) -> int:
        return int(self.ids.numel())

    def path_of_node(self, number: int) -> Tensor:
        """int64 tokens from the root to the node's end, by depth."""
        parts = []
        while number >= 0:
            node = self.nodes[number]
            parts.append(torch.arange(node.start, node.end))
            number = node.parent
        return torch.cat(parts[::-1])


def _shared_with_previous(arrays: list[Ids]) -> Ids:
    """For each sequence, how many tokens it shares with the one before it (the first: 0)."""
    out = np.zeros(len(arrays), dtype=np.int64)
    for i in range(1, len(arrays)):
        n = min(arrays[i - 1].size, arrays[i].size)
        different = np.flatnonzero(arrays[i - 1][:n] != arrays[i][:n])
        out[i] = different[0] if different.size else n
    return out


def _split(shared: Ids, lo: int, hi: int, depth: int) -> list[tuple[int, int]]:
    """[lo, hi) cut where neighbours share no more than `depth` tokens; last range first."""
    if lo == hi:
        return []
    cuts = [lo, *(lo + 1 + np.flatnonzero(shared[lo + 1 : hi] <= depth)).tolist(), hi]
    return list(itertools.pairwise(cuts))[::-1]


def num_unique_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens in the tree of `sequences`."""
    return TokenTree(sequences).num_tokens if sequences else 0
