"""The ways in which a chunk can be coded: the format's methods."""
