"""Texts on a terminal come in the order of their prompts."""

import io

from bagualu.trainer.generation.terminal import Terminal


def test_a_single_text_is_written_behind_its_prompt_while_it_grows():
    stream = io.StringIO()
    terminal = Terminal(["def "], stream)
    seen = []
    for text, ended in (("", False), ("ma", False), ("main", False), ("main()", True)):
        terminal.show([text], [ended])
        seen.append(stream.getvalue())
    terminal.close()
    assert seen == ["def ", "def ma", "def main", "def main()\n"]
    assert stream.getvalue() == seen[-1]


def test_a_text_that_ends_early_waits_for_those_in_front_of_it():
    stream = io.StringIO()
    terminal = Terminal(["a", "b", "c"], stream)
    terminal.show(["1", "2", "3"], [False, True, False])
    assert stream.getvalue() == "── 1 of 3\na1"
    terminal.show(["1x", "2", "3y"], [True, True, False])
    assert stream.getvalue() == "── 1 of 3\na1x\n\n── 2 of 3\nb2\n\n── 3 of 3\nc3y"
    terminal.close()
    assert stream.getvalue().endswith("c3y\n")
