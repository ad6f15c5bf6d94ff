"""Tests of what `graphprune.surgery` does."""
