"""What a trainer does: tells what changed since the last state, and writes it to the stream."""
