"""The error of labs."""


class LabError(Exception):
    """The lab cannot do what was requested; the message has the reason and the remedy."""
