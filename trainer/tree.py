"""A radix tree of token sequences: every shared prefix is one node, every token is stored once.

A node is a run of tokens with a parent; a sequence is a path from the root. Nodes are numbered in
depth-first order and own consecutive tokens in it. Equal token ids at equal prefixes have equal
activations, which is what makes sharing exact.
"""

from __future__ import annotations

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
        arrays: list[Ids] = [np.asarray(s, dtype=np.int64) for s in sequences]
        if any(a.size == 0 for a in arrays):
            raise ValueError("a sequence is empty")
        self.nodes: list[Node] = []
        self._ends: list[int] = [-1] * len(arrays)
        runs: list[Ids] = []
        num_tokens = 0
        # A stack entry is a set of sequences that agree before `depth`, hanging below `parent`.
        stack = [(group, 0, -1) for group in reversed(_by_token(range(len(arrays)), arrays, 0))]
        while stack:
            members, depth, parent = stack.pop()
            length = _common_length([arrays[i][depth:] for i in members])
            number = len(self.nodes)
            self.nodes.append(Node(num_tokens, num_tokens + length, parent, depth))
            runs.append(arrays[members[0]][depth : depth + length])
            num_tokens += length
            depth += length
            for i in members:
                if arrays[i].size == depth:
                    self._ends[i] = number
            longer = [i for i in members if arrays[i].size > depth]
            stack += [(g, depth, number) for g in reversed(_by_token(longer, arrays, depth))]
        self.ids: Tensor = torch.from_numpy(np.concatenate(runs) if runs else np.empty(0, np.int64))
        depths = [np.arange(n.depth, n.depth + n.end - n.start) for n in self.nodes]
        self.positions: Tensor = torch.from_numpy(
            np.concatenate(depths) if depths else np.empty(0, np.int64)
        )
        self.paths: list[Tensor] = [self.path_of_node(number) for number in self._ends]

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


def _by_token(members: Sequence[int], arrays: list[Ids], depth: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(int(arrays[i][depth]), []).append(i)
    return list(groups.values())


def _common_length(arrays: list[Ids]) -> int:
    first, length = arrays[0], arrays[0].size
    for other in arrays[1:]:
        length = min(length, other.size)
        different = np.flatnonzero(first[:length] != other[:length])
        if different.size:
            length = int(different[0])
    return length


def num_unique_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens in the tree of `sequences`."""
    return TokenTree(sequences).num_tokens if sequences else 0
