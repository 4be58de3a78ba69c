"""Small networks: building, saving and loading them, and reading their inner activations."""
