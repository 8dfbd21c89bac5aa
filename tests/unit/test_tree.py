import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alchemist.trainer.tree import TokenTree, num_unique_tokens

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=9)

# A busy machine is not a failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(sequences)
@patient
def test_paths_spell_the_sequences_and_every_prefix_is_stored_once(seqs):
    tree = TokenTree(seqs)
    for path, seq in zip(tree.paths, seqs, strict=True):
        assert tree.ids[path].tolist() == seq
        assert tree.positions[path].tolist() == list(range(len(seq)))
    prefixes = {tuple(s[: i + 1]) for s in seqs for i in range(len(s))}
    assert tree.num_tokens == len(prefixes) == num_unique_tokens(seqs)


@given(sequences)
@patient
def test_nodes_are_consecutive_runs_in_depth_first_order(seqs):
    tree = TokenTree(seqs)
    end = 0
    for number, node in enumerate(tree.nodes):
        assert node.start == end < node.end
        assert node.parent < number
        end = node.end
        parent_depth = 0
        if node.parent >= 0:
            parent = tree.nodes[node.parent]
            parent_depth = parent.depth + parent.end - parent.start
        assert node.depth == parent_depth
        assert torch.equal(
            tree.ids[tree.path_of_node(number)][node.depth :], tree.ids[node.start : node.end]
        )
    assert end == tree.num_tokens


def test_a_chain_of_many_branches_needs_no_recursion():
    seqs = [[0] * i + [1] for i in range(1, 500)]
    assert TokenTree(seqs).num_tokens == 499 + 499


def test_empty_sequences_are_refused():
    with pytest.raises(ValueError, match="empty"):
        TokenTree([[1], []])
