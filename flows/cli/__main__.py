"""`python -m flows.cli` is `sanitize`; torchrun starts it so."""

from flows.cli import app

app()
