"""The daemon of splitnet: it serves blocks of a model to clients and other peers."""
