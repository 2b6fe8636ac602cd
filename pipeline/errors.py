"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Something given by the user is not usable; the message is one sentence that names it and what is allowed."""


def about(path: object, error: InputError) -> InputError:
    """The error with the file it is about in front, unless it names it already."""
    return error if str(path) in str(error) else InputError(f"{path}: {error}")
