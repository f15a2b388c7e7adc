"""The exceptions for what a user can put right. Travels inside converted checkpoints."""


class InputError(ValueError):
    """Bad input: one sentence that says what was found, what was expected and what to do.

    The command line prints it and exits with code 2.
    """


class MissingPackage(InputError, ImportError):
    """An optional package is not installed; the sentence says how to install it."""


class CheckpointError(InputError):
    """The files of a checkpoint are damaged or incomplete, or do not belong together."""
