"""The spec language: text to a checked semantic graph."""
