"""What travels between processes: messages, fields, codecs of activations, and logs of what was sent."""
