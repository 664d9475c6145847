"""How curved a loss is, and what it costs to tell."""
