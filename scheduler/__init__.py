"""Pure planning: facts about a swarm in, decisions out. No sockets, no clock, no torch."""
