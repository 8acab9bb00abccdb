"""Guesses of the next tokens, which the peers verify."""
