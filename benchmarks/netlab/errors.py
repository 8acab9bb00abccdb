"""The error of labs."""


class LabError(Exception):
    """The lab cannot do a request; the message has the reason and the fix."""
