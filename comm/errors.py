"""Errors with a message for the person who started the run: one line with what was given, what was expected and the fix."""


class RecipeError(ValueError):
    """A recipe, layout or input cannot work. The message is a single line that contains the fix; the program then ends with exit
    code 2."""


class CommunicationError(RuntimeError):
    """Ranks could not connect, or a communication could not finish: another rank was lost, timed out or called a different
    collective."""


class StorageError(RuntimeError):
    """Storage cannot be read or written now but may recover. This error does not mean that stored data are damaged."""
