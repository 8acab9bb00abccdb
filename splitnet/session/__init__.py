"""Sessions along a route: the state machine, its requests, its driver, and kinds of sessions."""
