"""The exceptions for what a person can mend: the command line prints it as a single line."""


class UserError(Exception):
    """A mistake in a recipe, a file or an argument; the message names it and says what to do."""


class UnwritableError(UserError):
    """A file cannot be written: the disk is full, or the place refuses."""
