"""What a step reads behind the committed prefix: in one pass, sampled at each node, kept where it was accepted."""
