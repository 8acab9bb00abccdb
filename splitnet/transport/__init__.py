"""Sockets and links: one thread with all ZeroMQ sockets, connections and their bounds, pings, addresses."""
