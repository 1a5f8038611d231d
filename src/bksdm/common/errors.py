"""The one kind of error that a user can mend, and what other errors say in a line."""


class InputError(ValueError):
    """Input that the user gave and can put right: the message names the value and the mend.

    The command line prints it as one line and exits with code 2; as a library error it is a
    plain `ValueError`.
    """


def one_line(error: BaseException, most: int | None = 200) -> str:
    """What an error says, in one line of at most so many letters; the name of its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
