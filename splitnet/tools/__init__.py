"""Optional tools: the command line registers their commands, and no other part of splitnet imports them."""
