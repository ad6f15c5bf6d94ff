"""Tests of what `graphprune.latency` does."""
