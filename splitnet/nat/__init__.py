"""Connections through routers: relays, unreachable peers, tunnels, hole punching, port mapping."""
