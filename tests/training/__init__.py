"""Tests of what `graphprune.training.session` does."""
