"""The one exception that speaks to a person: bad input, said in one line."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, the record, what was wrong and
    what to do. Entry points print it without a traceback and exit with a code other than 0.
    """
