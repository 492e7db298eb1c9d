"""Connections without an answer, and whose they are."""

from bagualu.fault_tolerance.watchdog.links import LostLink, _address, cut_off


def link(rank: int, peer: int | None) -> LostLink:
    return LostLink(rank, (f"10.0.0.{rank}", 1), ("10.0.0.9", 2), peer, 100, 3)


def test_the_rank_at_one_end_of_every_lost_link_is_cut_off() -> None:
    assert cut_off([link(0, 3), link(1, 3), link(3, 1)]) == 3
    assert cut_off([link(3, 0), link(3, 1)]) == 3


def test_two_ends_of_one_link_cannot_be_told_apart() -> None:
    assert cut_off([link(0, 3), link(3, 0)]) is None
    assert cut_off([link(0, None)]) is None
    assert cut_off([link(0, 1), link(2, 3)]) is None
    assert cut_off([]) is None


def test_addresses_are_read_as_the_kernel_writes_them() -> None:
    assert _address("0100007F:1F90") == ("127.0.0.1", 8080)
    assert _address("0000000000000000FFFF00000100007F:1F90") == ("127.0.0.1", 8080)
    assert _address("00000000000000000000000001000000:0050") == ("::1", 80)
