"""Licenses: what is known of them, what they ask, and where they are written (model cards, SBOMs)."""
