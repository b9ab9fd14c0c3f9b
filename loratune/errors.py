"""The exceptions for what a user can mend, and how any message is made safe to print."""


class UserError(Exception):
    """A mistake in a recipe, a file or an argument; the message names it and says what to do."""


class UnwritableError(UserError):
    """A file cannot be written: the disk is full, or the place refuses."""


def visible(text: str) -> str:
    """A text with every control character but the line feed shown as Python writes it (`\\x1b`, `\\u202e`).

    Captions, file names and keys come from strangers, and a terminal obeys what they hold.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
