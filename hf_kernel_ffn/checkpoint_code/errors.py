"""The one exception for what a user can put right.

This file travels inside converted checkpoints: it imports nothing.
"""


class InputError(ValueError):
    """Bad input: one sentence that says what was found, what was expected and what to do.

    The command line prints it and exits with code 2.
    """
