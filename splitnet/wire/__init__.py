"""Messages between processes: their fields, codecs of activations, and the log of sent activations."""
