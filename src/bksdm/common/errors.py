"""The one kind of error that a user can mend."""


class InputError(ValueError):
    """Input that the user gave and can put right: the message names the value and the mend.

    The command line prints it as one line and exits with code 2; as a library error it is a
    plain `ValueError`.
    """
