"""Certificates: what nobody within the stated bounds can change about a prediction."""
