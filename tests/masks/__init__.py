"""Tests of what `graphprune.masks.channels` does."""
