"""Errors with a message for the person who started the run: one line with what was given, what was expected and the fix."""


class RecipeError(ValueError):
    """A recipe, layout or input cannot work. The message is a single line that contains the fix; the exit code is 2."""


class CommunicationError(RuntimeError):
    """A collective could not finish: another rank was lost, timed out or called a different collective."""


class StorageError(RuntimeError):
    """Storage that cannot be read or written now but may recover. It does not mean that stored data are damaged."""
