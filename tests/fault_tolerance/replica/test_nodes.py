"""Who shares a node, and who keeps whose copy."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bagualu.fault_tolerance.replica.nodes import NodeMap, node_token


def test_the_partner_is_in_the_same_place_on_the_next_node() -> None:
    nodes = NodeMap.by_token(["a", "a", "b", "b", "c", "c"])
    assert nodes.members == ((0, 1), (2, 3), (4, 5))
    assert nodes.partners == (2, 3, 4, 5, 0, 1)
    assert nodes.kept_for == ((4,), (5,), (0,), (1,), (2,), (3,))
    assert [nodes.leads(position) for position in range(6)] == [True, False] * 3


def test_nodes_of_different_sizes() -> None:
    nodes = NodeMap.by_token(["a", "a", "a", "b"])
    assert nodes.partners == (3, 3, 3, 0)
    assert nodes.kept_for == ((3,), (), (), (0, 1, 2))


def test_one_node_has_no_partners() -> None:
    assert NodeMap.by_token(["a"] * 4).partners == (None,) * 4


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_every_state_is_kept_on_another_node(tokens: list[str]) -> None:
    nodes = NodeMap.by_token(tokens)
    for position, partner in enumerate(nodes.partners):
        assert (partner is None) == (nodes.count == 1)
        if partner is not None:
            assert nodes.of[partner] != nodes.of[position]
            assert position in nodes.kept_for[partner]
    assert sorted(position for members in nodes.members for position in members) == list(range(len(tokens)))


def test_all_who_come_to_a_folder_get_one_token(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(node_token, [tmp_path] * 64))
    assert len(tokens) == 1
    (tmp_path / "other").mkdir()
    assert node_token(tmp_path / "other") not in tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == [".node", "other"]
