"""A step's tokens behind the committed prefix: reading them in one pass, sampling at each, keeping what was accepted."""
