"""Prefect and the command line: stages as tasks, jobs as flows. Only `tasks` imports Prefect."""

import logging
import os

# Before Prefect and Ray are first imported: the temporary server starts slowly on a laptop; no telemetry is sent.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Prefect sends what these loggers say to the page of a run, but leaves it to others which level they have.
if "sanitize" in os.environ.get("PREFECT_LOGGING_EXTRA_LOGGERS", ""):
    logging.getLogger("sanitize").setLevel(logging.INFO)
