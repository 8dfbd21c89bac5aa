"""One micro-batch as the engine sees it: unique tokens in engine order, who is recorded, who
attends to whom.

Engine order is [recorded | missing, on a loss path | missing, forward only]. The first two parts
are differentiated; the third are the mismatched pairs of KTO's KL estimate and everything that is
only scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alchemist.kernels.path_attention import PathBlock

from .rows import Recorded
from .tree import TokenTree

Pair = tuple[Sequence[int], Sequence[int]]
"""prompt ids, response ids; both non-empty."""


class TokenBatch:
    """Built on the CPU; index tensors are then moved to `device`.

    Args:
        loss: sequences whose log-probabilities get a gradient.
        scored: sequences whose log-probabilities are only wanted as values.
        recorded: for each of `loss` then `scored`, where its tokens are recorded, or None.
    """

    def __init__(
        self,
        loss: Sequence[Pair],
        scored: Sequence[Pair],
        recorded: Sequence[Recorded | None],
        device: torch.device,
    ) -> None:
        pairs = [*loss, *scored]
        # The last response token is predicted but never read.
        tree = TokenTree([[*prompt, *response[:-1]] for prompt, response in pairs])
        on_loss_path = torch.zeros(tree.num_tokens, dtype=torch.bool)
        for path in tree.paths[: len(loss)]:
            on_loss_path[path] = True
        rows, slots, gens = _records(tree, pairs, recorded)
        has_row = rows >= 0

        kind = torch.where(has_row, 0, torch.where(on_loss_path, 1, 2))
        order = torch.argsort(kind, stable=True)
        engine = torch.empty_like(order)
        engine[order] = torch.arange(order.numel())
        self.num_tokens = tree.num_tokens
        self.num_recorded = int(has_row.sum())
        self.num_differentiated = int((kind < 2).sum())

        # Tokens whose final hidden state is wanted: those of loss sequences first.
        spans = [
            path[len(prompt) - 1 :] for path, (prompt, _) in zip(tree.paths, pairs, strict=True)
        ]
        head_rank = torch.full((tree.num_tokens,), -1)
        loss_heads = torch.unique(torch.cat([*spans[: len(loss)], order[:0]]))
        head_rank[loss_heads] = torch.arange(loss_heads.numel())
        other = torch.unique(torch.cat([*spans[len(loss) :], order[:0]]))
        other = other[head_rank[other] < 0]
        head_rank[other] = loss_heads.numel() + torch.arange(other.numel())
        heads = torch.cat([loss_heads, other])
        self.num_loss_heads = loss_heads.numel()

        def move(t: Tensor) -> Tensor:
            return t.to(device)

        self.ids = move(tree.ids[order])
        self.positions = move(tree.positions[order])
        recorded_tokens = order[: self.num_recorded]
        self.rows = move(rows[recorded_tokens])
        self.slots = move(slots[recorded_tokens])
        self.gens = move(gens[recorded_tokens])
        self.heads = move(engine[heads])
        """[num heads] engine token of every head, loss heads first."""
        self.span_heads = [move(head_rank[span]) for span in spans]
        """For each sequence: the heads that predict its response tokens, in order."""
        self.targets = [move(torch.as_tensor(list(r), dtype=torch.int64)) for _, r in pairs]

        missing = engine >= self.num_recorded
        missing_heads = (head_rank >= 0) & missing
        self.missing_heads = move(engine[missing_heads] - self.num_recorded)
        """Missing tokens (counted from the first missing one) that are heads, by tree order."""
        self.missing_head_ranks = move(head_rank[missing_heads])
        recorded_heads = (head_rank >= 0) & has_row
        self.recorded_heads = move(engine[recorded_heads])
        self.recorded_head_ranks = move(head_rank[recorded_heads])

        def plan(rank: Tensor) -> list[PathBlock]:
            return _attention_plan(tree, engine, rank, device)

        nobody = torch.full_like(engine, -1)
        self.forward_plan = plan(torch.where(missing, engine - self.num_recorded, nobody))
        last = nobody.clone()
        last[missing_heads] = torch.arange(int(missing_heads.sum()))
        self.last_forward_plan = plan(last)
        self._tree, self._engine, self._head_rank, self._device = tree, engine, head_rank, device

    def backward_plan(self) -> list[PathBlock]:
        """Every differentiated token is a query."""
        rank = torch.where(self._engine < self.num_differentiated, self._engine, -1)
        return _attention_plan(self._tree, self._engine, rank, self._device)

    def last_backward_plan(self) -> list[PathBlock]:
        """Only loss heads are queries, in head order."""
        rank = torch.where(self._head_rank < self.num_loss_heads, self._head_rank, -1)
        return _attention_plan(self._tree, self._engine, rank, self._device)


def _records(
    tree: TokenTree, pairs: Sequence[Pair], recorded: Sequence[Recorded | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, slot and generation of every token of the tree; any sample's record serves a shared
    token.
    """
    out = torch.full((3, tree.num_tokens), -1, dtype=torch.int64)
    for path, (prompt, _), record in zip(tree.paths, pairs, recorded, strict=True):
        if record is None:
            continue
        length = record.rows.numel()
        if length not in (len(prompt), len(path)):
            raise ValueError(
                f"a sample's record covers {length} tokens; its prompt has {len(prompt)}, with the "
                f"response but for its last token {len(path)}"
            )
        known = record.rows >= 0
        out[:, path[:length][known]] = torch.stack(
            [record.rows[known], record.slots[known], record.gens[known]]
        )
    return out[0], out[1], out[2]


def _attention_plan(
    tree: TokenTree, engine: Tensor, rank: Tensor, device: torch.device
) -> list[PathBlock]:
    """Blocks of the tokens with `rank` ≥ 0 (their row among the queries). A node that has one child
    with queries is joined to it: one path, one block.
    """
    own = [torch.arange(n.start, n.end) for n in tree.nodes]
    own = [tokens[rank[tokens] >= 0] for tokens in own]
    children: list[list[int]] = [[] for _ in tree.nodes]
    for number in range(len(tree.nodes) - 1, -1, -1):
        parent = tree.nodes[number].parent
        if parent >= 0 and (own[number].numel() or children[number]):
            children[parent].append(number)
    blocks: list[PathBlock] = []
    carried: dict[int, Tensor] = {}
    for number, tokens in enumerate(own):
        if number in carried:
            tokens = torch.cat([carried.pop(number), tokens])
        if len(children[number]) == 1:
            carried[children[number][0]] = tokens
        elif tokens.numel():
            path = tree.path_of_node(number)[: int(tree.positions[tokens[-1]]) + 1]
            blocks.append(
                PathBlock(rank[tokens].to(device), tree.positions[tokens], engine[path].to(device))
            )
    return blocks
