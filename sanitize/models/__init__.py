"""Small networks, how to build, save and load them, and how to read their inner activations."""
