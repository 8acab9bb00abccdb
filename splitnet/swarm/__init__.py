"""A client's knowledge of one model's swarm: peers, measurements, plans, links."""
