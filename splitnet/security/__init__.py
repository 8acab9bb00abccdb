"""Keys, closed swarms, and the rights that a peer's owner grants each key."""
