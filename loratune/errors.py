"""The one exception for what a person can mend: the command line prints it as a single line."""


class UserError(Exception):
    """A mistake in a recipe, a file or an argument; the message names it and says what to do."""
