"""Mistakes a user can mend. Commands print them as one line and exit with the class's code; anything else is a bug
and keeps its traceback. A message says what was got, what was expected, and what to do."""


class UserError(ValueError):
    """A wrong setting or argument."""

    exit_code = 2


class DataError(UserError):
    """An image, folder or sample file that cannot be used."""

    exit_code = 3


class ImageError(DataError):
    """Image files that cannot be used; `paths` are they, so that their repair can be told from other images. `lines`: a
    message for each, where the error's own shows the first of many."""

    lines: tuple[str, ...] = ()

    def __init__(self, message: str, *paths: object):
        super().__init__(message)
        self.paths = tuple(map(str, paths))


class IntegrityError(UserError):
    """A file that is incomplete, damaged, or not what it should be."""

    exit_code = 4


class MismatchError(UserError):
    """Two things that are each fine and do not belong together."""

    exit_code = 5


def short(error: Exception, limit: int = 160) -> str:
    """The text of another library's error, which may be pages long: one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
