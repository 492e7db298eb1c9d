"""Takes the words of a verb that are no keys of a recipe out of a command line."""

from collections.abc import Callable, Sequence

from bagualu.comm.errors import RecipeError


def split_words(words: Sequence[str], is_own: Callable[[str], bool]) -> tuple[dict[str, str], list[str]]:
    """Returns the values of the keys for which `is_own` is true, and the other words. Raises RecipeError for such a key that is
    given twice."""
    own: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not is_own(key):
            others.append(word)
        elif key in own:
            raise RecipeError(f"{word} is the second {key}; give one")
        else:
            own[key] = value
    return own, others
