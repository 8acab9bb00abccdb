"""Models of transformers whose blocks are remote."""
