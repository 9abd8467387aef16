"""A delta's page, README.md: the fine-tune's text and metadata, how to use the delta, and the licenses."""

from .writing import address_card, write_card

__all__ = ["address_card", "write_card"]
