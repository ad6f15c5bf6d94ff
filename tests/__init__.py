"""The tests of graphprune."""
