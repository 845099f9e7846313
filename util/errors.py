"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
    """A flag, file, image or annotation is not usable; the message says which, why and what to do.

    The command line prints the message as one line, without a stack trace.
    """

    @property
    def line(self) -> str:
        """The message alone: a data-loading worker's error arrives wrapped in the text of its stack trace."""
        return str(self).rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


def reason(error: BaseException) -> str:
    """What another library's exception says, as the part of a line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
