"""From recordings to groups: labels are propagated, causes with one footprint gathered, what is frozen explained."""
