"""Masks of channels and of single elements."""
