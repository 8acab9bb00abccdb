"""Sockets and links: the thread that owns all ZeroMQ sockets, bounds on connections, pings, addresses."""
