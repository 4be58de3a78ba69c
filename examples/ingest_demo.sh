#!/usr/bin/env bash
# From nothing to sanitized deliveries on one machine, as deployments/README.md goes through it:
#
#     examples/ingest_demo.sh [FOLDER]        from the project's root, in an environment with sanitize
#
# A server, a work pool and a worker on loopback; a reference from approved digits; an event starts the ingest of new
# shards, which are accepted. The poisoned samples of a second delivery are quarantined and the batch is held; after
# `sanitize approve` its clean samples are in the feed. Takes minutes; the server and the worker end with the script.
# PORT is the port of the server (default 4200).
set -euo pipefail
export SANITIZE_HOME=${1:-$PWD/runs/ingest_demo} PORT=${PORT:-4200}
export PREFECT_HOME=$SANITIZE_HOME/.prefect PREFECT_API_URL=http://127.0.0.1:$PORT/api
export PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PREFECT_CLI_PROMPT=false OMP_NUM_THREADS=1
mkdir -p "$SANITIZE_HOME"/data/{approved,incoming} "$SANITIZE_HOME"/runs

say() { printf '\n== %s\n' "$*"; }

stop() {  # stop PID: SIGTERM, then SIGKILL for a worker that still waits for its server
  kill "$1" 2>/dev/null || return 0
  for _ in {1..20}; do kill -0 "$1" 2>/dev/null || return 0; sleep 0.5; done
  kill -9 "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true  # or the shell would say what became of it
}
# The worker first: without its server it would wait for it.
trap '[ -z "${worker:-}" ] || stop "$worker"; [ -z "${server:-}" ] || stop "$server"' EXIT

until_batch() {  # until_batch STATUS: wait until the ledger says it of a batch
  until grep -qsE "\"status\": *\"$1\"" "$SANITIZE_HOME"/runs/store/ledger/*.json; do
    [ $((waited += 1)) -lt 900 ] || { echo "no batch is $1; see $SANITIZE_HOME/worker.log" >&2; return 1; }
    sleep 1
  done
}
waited=0

say "a server, a pool, a worker"
prefect server start --host 127.0.0.1 --port "$PORT" > "$SANITIZE_HOME/server.log" 2>&1 &
server=$!
until curl --silent --fail "$PREFECT_API_URL/health" > /dev/null; do sleep 1; done
prefect work-pool create cpu-pool --type process --overwrite
prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
prefect automation create --from-file deployments/automations.yaml
prefect worker start --pool cpu-pool --limit 1 > "$SANITIZE_HOME/worker.log" 2>&1 &
worker=$!

say "what was approved: shards that were cleaned, and looked at"
python - <<'PYTHON'
import os
from pathlib import Path
from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig, index_shards

data, compute = Path(os.environ["SANITIZE_HOME"], "data"), Compute(device="cpu")
shards = write_digits(str(data / "digits"), compute, n_shards=18).shards()
for shard in shards[:12]:
    (data / "approved" / Path(shard).name).hardlink_to(shard)
honest = index_shards(IndexConfig(n_classes=10), shards[15:], str(data / "index"), compute)
poison_shards(BadNetsConfig(rate=0.2), honest, str(data / "poisoned"), compute)
PYTHON
prefect deployment run clean/local --watch -p out=runs/first \
  -p 'config={"shards": ["data/approved"], "scorers": [{"kind": "toxic_direction"}, {"kind": "neighbours"}]}'
sanitize reference "$SANITIZE_HOME/runs/first" --store "$SANITIZE_HOME/runs/store" --level 0.02 --note "looked at the page"

say "a delivery: an event starts its ingest"
cp "$SANITIZE_HOME"/data/digits/digits-001[2-4].tar "$SANITIZE_HOME/data/incoming"
prefect events emit sanitize.shards.landed --resource-id sanitize.dataset.digits
until_batch accepted
sanitize batches --store "$SANITIZE_HOME/runs/store"
ls "$SANITIZE_HOME"/runs/store/batches/*/90-report/index.html

say "a poisoned delivery: its poison is quarantined, the batch is held"
cp "$SANITIZE_HOME"/data/poisoned/shards/*.tar "$SANITIZE_HOME/data/incoming"
prefect events emit sanitize.shards.landed --resource-id sanitize.dataset.digits
until_batch held
sanitize batches --store "$SANITIZE_HOME/runs/store"

held=$(sanitize batches --store "$SANITIZE_HOME/runs/store" --status held --json |
  python -c 'import json, sys; print(json.load(sys.stdin)[0]["batch"])')
ls "$SANITIZE_HOME/runs/store/batches/$held/90-report/index.html"

say "a person looks at the page, and releases what is clean"
sanitize approve "$held" --store "$SANITIZE_HOME/runs/store" --note "the patch in class 0 is in quarantine"
sanitize batches --store "$SANITIZE_HOME/runs/store"

say "what is left of the poison in the feed"
sanitize verify "$SANITIZE_HOME/runs/store/batches/$held"
python - <<'PYTHON'
import json, os, tarfile
from pathlib import Path
import pyarrow.parquet as pq

home = Path(os.environ["SANITIZE_HOME"])
truth = [row for file in (home / "data/poisoned/rows").iterdir() for row in pq.read_table(file).to_pylist()]
poisoned = {row["key"] for row in truth if row["poisoned"]}
feed = json.loads((home / "runs/store/feed.json").read_text())["shards"]
fed = {Path(name).name.partition(".")[0] for line in feed for name in tarfile.open(home / "runs/store" / line["shard"]).getnames()}
print(f"poisoned samples: {len(poisoned)}; in the feed: {len(poisoned & fed)}")
PYTHON
