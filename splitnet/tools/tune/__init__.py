"""Fine-tuning through a swarm."""
