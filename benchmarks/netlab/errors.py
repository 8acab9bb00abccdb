"""The error of labs."""


class LabError(Exception):
    """The lab cannot do what was asked; says why and how to fix it."""
