"""Tests of what `graphprune.sizes` does."""
