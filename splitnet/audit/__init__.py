"""Audits: what hops were given is computed again, and compared with what they gave."""
