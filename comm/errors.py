"""The errors a person is meant to read: one line, what was given, what was expected, what to type."""


class RecipeError(ValueError):
    """A recipe, layout or input that cannot work. Its message is one line that contains the fix; exit code 2."""


class CommunicationError(RuntimeError):
    """A collective that could not finish: a peer was lost, timed out, or called something else."""


class StorageError(RuntimeError):
    """Storage that cannot be written or read now, and may be again. Nothing on it was found wrong."""
