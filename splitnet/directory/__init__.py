"""The directory of peers: signed records in a DHT, asked of peers, or found on the local network."""
