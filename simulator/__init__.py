"""A swarm that exists only in numbers: peers, clients and their network, run by the planning code of real ones."""
