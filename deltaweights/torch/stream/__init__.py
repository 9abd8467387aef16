"""Weight streams: a publisher's updates, and the models that follow them."""
