"""Tests of what `graphprune.recipes` does."""
