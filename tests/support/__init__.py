"""What several test files and tools share: networks, oracles and measurements."""
