"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Something given by the user is not usable; the message is one sentence that names it and what is allowed."""
