"""What a reader does: finds its way through the stream to a state, prepares it, and writes it to a model."""
