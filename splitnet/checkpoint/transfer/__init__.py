"""Weights from other peers and from the hub, by pieces with digests."""
