"""How we would train with this library: the methods, the loop, and what is measured of a network."""
