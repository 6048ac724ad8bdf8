"""The embedded pair: a small chat target and its draft, made ready on first use."""
