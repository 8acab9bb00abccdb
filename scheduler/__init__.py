"""Pure planning of splitnet: facts about a swarm in, decisions out. No sockets, no clock, no torch."""
