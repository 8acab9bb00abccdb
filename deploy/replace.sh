#!/bin/sh
# Replaces the bootstrap nodes and gateways of a running swarm one after the other: replace.sh FILE [SECONDS]
#
# Each line of FILE names a process by two commands, with " => " between them:
#   splitnet status MODEL --join ADDR --json | grep -q '"missing": \[\]' => ssh one systemctl restart splitnet-dht
#   curl -fs http://one:8000/health => ssh one systemctl restart splitnet-serve
# The first one ends with 0 while the process serves. The second one ends the process, waits for its end, and starts the
# new one. Nothing is replaced unless all processes serve, and each new one must serve within SECONDS (300).
# See docs/gateways.md.
set -eu
file=$1
limit=${2:-300}

serves() { sh -c "${1%% => *}" >/dev/null 2>&1 </dev/null; }

lines=$(grep -v -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$file")
while IFS= read -r line; do
    case $line in
        *" => "*) ;;
        *) echo "$line: write CHECK => COMMAND" >&2; exit 2 ;;
    esac
    serves "$line" || { echo "${line%% => *} fails: nothing was replaced" >&2; exit 1; }
done <<END
$lines
END
while IFS= read -r line; do
    echo "${line#* => } ..."
    sh -c "${line#* => }" </dev/null
    until=$(($(date +%s) + limit))
    until serves "$line"; do
        [ "$(date +%s)" -lt "$until" ] || { echo "${line%% => *} fails after $limit s: the rest was not replaced" >&2; exit 1; }
        sleep 1
    done
done <<END
$lines
END
echo "all were replaced"
