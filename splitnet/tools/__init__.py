"""Tools that are leaves: their commands are registered, the core does not know them."""
