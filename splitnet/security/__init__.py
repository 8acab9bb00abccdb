"""Keys, closed swarms, and what a peer's owner grants each key."""
