"""Hardware platforms this package adds to SGLang."""
