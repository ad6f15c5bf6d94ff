"""Tests of what `graphprune.verify` does."""
