"""Audits: blocks of hops are computed again from the inputs of the hops, and the outputs compared."""
